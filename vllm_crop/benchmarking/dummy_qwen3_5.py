# SPDX-License-Identifier: Apache-2.0
"""A Qwen3.5 of any size with random weights, scaled as in dummy_llava.py, for benchmark and tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_crop.benchmarking.dummy_llava import DummySize, make_tokenizer, save_dummy, text_sizes
from vllm_crop.benchmarking.dummy_qwen2_5_vl import (
    CHAT_TEMPLATE,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

TINY = DummySize(layers=8, branch_gain=0.6)
# The tower's share of the multiply-adds is 0.17, Qwen3.5-9B's 0.19.
BENCH = DummySize(
    layers=12, hidden=768, heads=12, vision_layers=8, vision_hidden=256, max_positions=32768, branch_gain=0.6
)
BENCH_MAX_TOKENS = 16384
PATCH, MERGE = 16, 2
MAX_TOKENS = 640  # of an image
FULL_ATTENTION_EVERY, HEAD = 4, 64
LINEAR = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The Qwen3_5Config; every fourth layer has full attention, of whose heads a quarter turns."""
    from transformers import Qwen3_5Config

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "model_type": "qwen3_5_vision",
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": 4,
        "out_hidden_size": size.hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 12**2,
    }
    half = HEAD // 8  # frequencies, dealt out to time, rows and columns
    text = {
        **text_sizes(size, size.heads // 2),
        "model_type": "qwen3_5_text",
        "full_attention_interval": FULL_ATTENTION_EVERY,
        "head_dim": HEAD,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16],
        },
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
        **LINEAR,
    }
    return Qwen3_5Config(
        architectures=["Qwen3_5ForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        dtype="float32",
    )


def make_processor(max_tokens: int = MAX_TOKENS) -> Any:
    """The Qwen3VLProcessor, tokenizer included."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pixels = {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": max_tokens * (PATCH * MERGE) ** 2}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, patch_size=PATCH, merge_size=MERGE),
        tokenizer=make_tokenizer(SPECIAL_TOKENS),
        video_processor=Qwen3VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    from transformers import Qwen3_5ForConditionalGeneration

    return write_checkpoint(folder, size, seed, make_config, Qwen3_5ForConditionalGeneration)


def make_bench_checkpoint(folder: Path, weights: bool = True) -> Path:
    """The benchmark's model; without `weights` only what vLLM needs to make its own up."""
    from transformers import Qwen3_5ForConditionalGeneration

    return write_checkpoint(
        folder, BENCH, 0, make_config, Qwen3_5ForConditionalGeneration, BENCH_MAX_TOKENS, weights
    )


def write_checkpoint(
    folder: Path,
    size: DummySize,
    seed: int,
    config_of: Callable[[DummySize, Any], Any],
    model_class: Any,
    max_tokens: int = MAX_TOKENS,
    weights: bool = True,
) -> Path:
    """The same for any model of transformers with this processor.

    Args:
        config_of: size and tokenizer -> the model's configuration.
        max_tokens: of an image.
        weights: whether to write any.
    """
    processor = make_processor(max_tokens)
    config = config_of(size, processor.tokenizer)
    return save_dummy(folder, size, seed, config, model_class, processor, weights)
