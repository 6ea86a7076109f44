# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-VL checkpoint of any size with random weights, scaled as in benchmarking/dummy_llava.py."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking.dummy_llava import VOCAB_SIZE, DummySize, scale_weights
from vllm_crop.benchmarking.dummy_qwen2_5_vl import (
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)
from vllm_crop.benchmarking.dummy_qwen3_5 import MERGE, PATCH, make_processor

TINY = DummySize(layers=8, branch_gain=0.6)
ATTENTION_GAIN = 2.0  # queries and keys are normalised: what their projections' width does elsewhere


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The Qwen3VLConfig; every layer of the vision tower gives deepstack features."""
    from transformers import Qwen3VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": 4,
        "out_hidden_size": size.hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 12**2,
        "deepstack_visual_indexes": list(range(size.vision_layers)),
    }
    half = size.hidden // size.heads // 2  # frequencies of a head, dealt out to time, rows and columns
    text = {
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.hidden // size.heads,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16],
        },
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        dtype="float32",
    )


def sharpen_attention(model: Any) -> Any:
    """Widen the queries of a Qwen3-VL of transformers."""
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data.fill_(ATTENTION_GAIN)
    return model


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    processor = make_processor()
    config = make_config(size, processor.tokenizer)
    torch.manual_seed(seed)
    model = sharpen_attention(scale_weights(Qwen3VLForConditionalGeneration(config), size))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
