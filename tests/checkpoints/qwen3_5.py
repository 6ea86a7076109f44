# SPDX-License-Identifier: Apache-2.0
"""A Qwen3.5 checkpoint of any size with random weights, scaled as in benchmarking/dummy_llava.py."""

from pathlib import Path
from typing import Any

from tests.checkpoints.qwen3_vl import TINY, make_processor
from tests.checkpoints.qwen3_vl import make_config as make_qwen3_vl_config
from vllm_crop.benchmarking.dummy_llava import DummySize, scale_weights

FULL_ATTENTION_EVERY, HEAD = 4, 64
LINEAR = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The Qwen3_5Config; every fourth layer has full attention, as published."""
    from transformers import Qwen3_5Config

    config = make_qwen3_vl_config(size, tokenizer).to_dict()
    config |= {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    config["vision_config"] |= {"model_type": "qwen3_5_vision"}
    del config["vision_config"]["deepstack_visual_indexes"]
    # A quarter of a head turns.
    half = HEAD // 8
    sections = [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16]
    rope = {**config["text_config"]["rope_parameters"], "partial_rotary_factor": 0.25}
    config["text_config"] |= {
        "model_type": "qwen3_5_text",
        "full_attention_interval": FULL_ATTENTION_EVERY,
        "head_dim": HEAD,
        "rope_parameters": {**rope, "mrope_section": sections},
        **LINEAR,
    }
    return Qwen3_5Config.from_dict(config)


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    processor = make_processor()
    config = make_config(size, processor.tokenizer)
    torch.manual_seed(seed)
    model = scale_weights(Qwen3_5ForConditionalGeneration(config), size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
