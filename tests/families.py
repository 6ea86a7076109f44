# SPDX-License-Identifier: Apache-2.0
"""The model families that parity tests run over: a new one needs an entry here, and a reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import (
    glm4v,
    glm4v_moe,
    internvl_chat,
    llava_onevision,
    llava_siglip,
    mistral3,
    qwen2_vl,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
)
from tests.reference import (
    HfGlm4v,
    HfGlm4vMoe,
    HfInternVL,
    HfInternVLChat,
    HfLlava,
    HfLlavaNext,
    HfLlavaOnevision,
    HfMistral3,
    HfQwen2_5VL,
    HfQwen2VL,
    HfQwen3_5,
    HfQwen3_5Moe,
    HfQwen3VL,
    HfQwen3VLMoe,
    HfReference,
)
from vllm_crop.benchmarking import dummy_internvl as internvl
from vllm_crop.benchmarking import dummy_llava, dummy_qwen2_5_vl
from vllm_crop.benchmarking import dummy_llava_next as llava_next
from vllm_crop.benchmarking import dummy_qwen3_5 as qwen3_5
from vllm_crop.benchmarking.dummy_llava import DEEP, TINY, DummySize


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: of the module of its model class, vLLM's and ours, unless `of_module` is.
        make_checkpoint: writes a tiny one with random weights, whose logits depend on all of the input.
        shallow, deep: the sizes for compression and for eviction.
        reference: the same model in transformers.
        looking: layers that heat maps are made of in tests.
        options: of engines with such a checkpoint.
        evicting_options: of those that evict, besides.
    """

    name: str
    make_checkpoint: Callable[[Path, DummySize], Path]
    shallow: DummySize
    deep: DummySize
    reference: type[HfReference]
    of_module: str = ""
    looking: tuple[int, ...] = (1, 3, 6)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    evicting_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

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
LLAVA_SIGLIP = Family(
    "llava_siglip",
    llava_siglip.make_checkpoint,
    llava_siglip.TINY,
    llava_siglip.TINY,
    HfLlava,
    of_module="llava",
)
LLAVA_NEXT_SIGLIP = Family(
    "llava_next_siglip",
    llava_siglip.make_next_checkpoint,
    llava_siglip.TINY,
    llava_siglip.TINY,
    HfLlavaNext,
    of_module="llava_next",
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
# A block is as large as the state of a layer that remembers, a quarter of a megabyte.
_HYBRID: dict[str, Any] = {
    **{"of_module": "qwen3_5", "looking": (3, 7)},
    "options": {"num_gpu_blocks_override": 200},
    "evicting_options": {"enable_prefix_caching": False},
}
QWEN3_5 = Family("qwen3_5", qwen3_5.make_checkpoint, qwen3_vl.TINY, qwen3_vl.TINY, HfQwen3_5, **_HYBRID)
QWEN3_5_MOE = Family(
    "qwen3_5_moe", qwen3_5_moe.make_checkpoint, qwen3_vl.TINY, qwen3_vl.TINY, HfQwen3_5Moe, **_HYBRID
)
INTERNVL = Family(
    "internvl_hf", internvl.make_checkpoint, internvl.TINY, internvl.TINY, HfInternVL, of_module="interns1"
)
INTERNVL_CHAT = Family(
    "internvl_chat",
    internvl_chat.make_chat_checkpoint,
    internvl.TINY,
    internvl.TINY,
    HfInternVLChat,
    of_module="internvl",
    options={"trust_remote_code": True},
)
MISTRAL3 = Family("mistral3", mistral3.make_checkpoint, mistral3.TINY, mistral3.TINY, HfMistral3)
GLM4V = Family("glm4v", glm4v.make_checkpoint, glm4v.TINY, glm4v.TINY, HfGlm4v, "glm4_1v")
GLM4V_MOE = Family("glm4v_moe", glm4v_moe.make_checkpoint, glm4v.TINY, glm4v.TINY, HfGlm4vMoe, "glm4_1v")
FAMILIES = (
    *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, LLAVA_SIGLIP, LLAVA_NEXT_SIGLIP),
    *(QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE),
    *(GLM4V, GLM4V_MOE, INTERNVL, INTERNVL_CHAT, MISTRAL3),
)
# Of two architectures with the same pair of vision towers, one has checkpoints with the second.
UNPUBLISHED = (LLAVA_NEXT_SIGLIP,)
