# SPDX-License-Identifier: Apache-2.0
"""The model families that parity tests run over: a new one needs an entry here, and a reference."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import glm4v, glm4v_moe, llava_onevision, qwen2_vl, qwen3_vl, qwen3_vl_moe
from tests.reference import (
    HfGlm4v,
    HfGlm4vMoe,
    HfLlava,
    HfLlavaNext,
    HfLlavaOnevision,
    HfQwen2_5VL,
    HfQwen2VL,
    HfQwen3VL,
    HfQwen3VLMoe,
    HfReference,
)
from vllm_crop.benchmarking import dummy_llava, dummy_qwen2_5_vl
from vllm_crop.benchmarking import dummy_llava_next as llava_next
from vllm_crop.benchmarking.dummy_llava import DEEP, TINY, DummySize


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: of the module of its model class, vLLM's and ours, unless `of_module` is.
        make_checkpoint: writes a tiny one with random weights, whose logits depend on all of the input.
        shallow, deep: the sizes for compression and for eviction.
        reference: the same model in transformers.
    """

    name: str
    make_checkpoint: Callable[[Path, DummySize], Path]
    shallow: DummySize
    deep: DummySize
    reference: type[HfReference]
    of_module: str = ""

    @property
    def module(self) -> str:
        """Of its model class, vLLM's and ours."""
        return self.of_module or self.name

    def __str__(self) -> str:
        return self.name


LLAVA = Family("llava", dummy_llava.make_checkpoint, TINY, DEEP, HfLlava)
LLAVA_NEXT = Family("llava_next", llava_next.make_checkpoint, llava_next.TINY, llava_next.TINY, HfLlavaNext)
LLAVA_ONEVISION = Family(
    "llava_onevision",
    llava_onevision.make_checkpoint,
    llava_onevision.TINY,
    llava_onevision.TINY,
    HfLlavaOnevision,
)
QWEN2_VL = Family(
    "qwen2_vl", qwen2_vl.make_checkpoint, dummy_qwen2_5_vl.TINY, dummy_qwen2_5_vl.TINY, HfQwen2VL
)
QWEN2_5_VL = Family(
    "qwen2_5_vl", dummy_qwen2_5_vl.make_checkpoint, dummy_qwen2_5_vl.TINY, dummy_qwen2_5_vl.TINY, HfQwen2_5VL
)
QWEN3_VL = Family("qwen3_vl", qwen3_vl.make_checkpoint, qwen3_vl.TINY, qwen3_vl.TINY, HfQwen3VL)
QWEN3_VL_MOE = Family(
    "qwen3_vl_moe", qwen3_vl_moe.make_checkpoint, qwen3_vl.TINY, qwen3_vl.TINY, HfQwen3VLMoe
)
GLM4V = Family("glm4v", glm4v.make_checkpoint, glm4v.TINY, glm4v.TINY, HfGlm4v, "glm4_1v")
GLM4V_MOE = Family("glm4v_moe", glm4v_moe.make_checkpoint, glm4v.TINY, glm4v.TINY, HfGlm4vMoe, "glm4_1v")
FAMILIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    GLM4V,
    GLM4V_MOE,
)
