# SPDX-License-Identifier: Apache-2.0
"""A Qwen2.5-VL of any size with random weights, scaled as in dummy_llava.py, for benchmark and tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import VOCAB_SIZE, DummySize, make_tokenizer, save_dummy

VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD = (
    f"<|{name}|>" for name in ("vision_start", "image_pad", "vision_end", "video_pad")
)
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD)
TINY = DummySize(layers=8, branch_gain=0.6)
# The tower's share of the work of a picture of 4,096 tokens is about that of the published 7B model, 0.3, and
# as there one layer in eight looks at all of the picture and the others within windows of 4x4 tokens.
BENCH = DummySize(
    layers=12, hidden=768, heads=12, vision_layers=8, vision_hidden=256, max_positions=32768, branch_gain=0.6
)
BENCH_WINDOW, BENCH_MAX_TOKENS = 4, 16384
PATCH, MERGE = 14, 2
MAX_TOKENS = 640  # of an image
CHAT_TEMPLATE = dummy_llava.CHAT_TEMPLATE.replace(
    dummy_llava.IMAGE_TOKEN, VISION_START + IMAGE_PAD + VISION_END
)


def make_config(size: DummySize, tokenizer: Any, window: int = 2) -> Any:
    """The Qwen2_5_VLConfig; all but the tower's last layer look within windows of `window`^2 tokens."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": 4,
        "out_hidden_size": size.hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": window * PATCH * MERGE,
        "fullatt_block_indexes": [size.vision_layers - 1],
    }
    half = size.hidden // size.heads // 2  # frequencies of a head, shared out to time, rows and columns
    text = {
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        },
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        dtype="float32",
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    return write_checkpoint(
        folder, size, seed, make_config, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    )


def make_bench_checkpoint(folder: Path, weights: bool = True) -> Path:
    """The benchmark's model; without `weights` only what vLLM needs to make its own up."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    return write_checkpoint(
        folder,
        BENCH,
        0,
        partial(make_config, window=BENCH_WINDOW),
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        BENCH_MAX_TOKENS,
        weights,
    )


def write_checkpoint(
    folder: Path,
    size: DummySize,
    seed: int,
    config_of: Callable[[DummySize, Any], Any],
    model_class: Any,
    processor_class: Any,
    max_tokens: int = MAX_TOKENS,
    weights: bool = True,
) -> Path:
    """The same for any model of transformers with Qwen2-VL's image processor.

    Args:
        config_of: size and tokenizer -> the model's configuration.
        max_tokens: of an image.
        weights: whether to write any.
    """
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = make_tokenizer(SPECIAL_TOKENS)
    pixels = {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": max_tokens * (PATCH * MERGE) ** 2}
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )
    config = config_of(size, tokenizer)
    return save_dummy(folder, size, seed, config, model_class, processor, weights)
