# SPDX-License-Identifier: Apache-2.0
"""A Qwen2-VL checkpoint with random weights, otherwise as dummy_qwen2_5_vl.py makes it, for the tests."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking.dummy_llava import DummySize
from vllm_crop.benchmarking.dummy_qwen2_5_vl import MERGE, PATCH, TINY, write_checkpoint
from vllm_crop.benchmarking.dummy_qwen2_5_vl import make_config as make_later_config


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The Qwen2VLConfig; its vision tower looks everywhere in every layer."""
    from transformers import Qwen2VLConfig

    config = make_later_config(size, tokenizer).to_dict()
    config |= {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    config["vision_config"] = {
        "depth": size.vision_layers,
        "embed_dim": size.vision_hidden,
        "hidden_size": size.hidden,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    config["text_config"]["model_type"] = "qwen2_vl_text"
    return Qwen2VLConfig.from_dict(config)


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    return write_checkpoint(
        folder, size, seed, make_config, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    )
