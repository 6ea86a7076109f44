# SPDX-License-Identifier: Apache-2.0
"""A Qwen3.5 checkpoint with a mixture of experts, otherwise as benchmarking/dummy_qwen3_5.py makes it."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking.dummy_llava import DummySize
from vllm_crop.benchmarking.dummy_qwen3_5 import TINY, make_config, write_checkpoint

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def make_moe_config(size: DummySize, tokenizer: Any) -> Any:
    """The Qwen3_5MoeConfig; every decoder layer has experts, and one that all tokens share."""
    from transformers import Qwen3_5MoeConfig

    config = make_config(size, tokenizer).to_dict()
    config |= {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    config["vision_config"] |= {"model_type": "qwen3_5_moe_vision"}
    config["text_config"] |= {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 3 * size.hidden // 2,
        "shared_expert_intermediate_size": 3 * size.hidden // 2,
        **EXPERTS,
    }
    return Qwen3_5MoeConfig.from_dict(config)


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    from transformers import Qwen3_5MoeForConditionalGeneration

    return write_checkpoint(folder, size, seed, make_moe_config, Qwen3_5MoeForConditionalGeneration)
