# SPDX-License-Identifier: Apache-2.0
"""A LLaVA-NeXT of any size with random weights, scaled as in dummy_llava.py, for benchmark and tests."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    DummySize,
    make_tokenizer,
)

TINY = DummySize(layers=8, branch_gain=0.6)
# The tower's share of the multiply-adds is that of LLaVA-v1.6-Mistral-7B, 0.04;
# so are its tiles, of 576 tokens.
BENCH = DummySize(layers=12, hidden=768, heads=12, vision_layers=8, vision_hidden=256, branch_gain=0.6)
PATCH, TILE, BENCH_TILE = 14, 140, 336  # pixels
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # in tiles those of published checkpoints


def make_config(size: DummySize, image_token_id: int, tile: int) -> Any:
    """The LlavaNextConfig; its language model is a Mistral without sliding window, as in LLaVA-v1.6."""
    from transformers import LlavaNextConfig, MistralConfig

    vision = dummy_llava.make_config(size, image_token_id).vision_config
    vision.image_size = tile
    text = MistralConfig(
        architectures=["MistralForCausalLM"],
        **dummy_llava.text_sizes(size, size.heads // 2),
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_grid_pinpoints=_resolutions(tile),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float32",
        eos_token_id=1,
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    return _write_checkpoint(folder, size, seed, TILE, weights=True)


def make_bench_checkpoint(folder: Path, weights: bool = True) -> Path:
    """The benchmark's model; without `weights` only what vLLM needs to make its own up."""
    return _write_checkpoint(folder, BENCH, 0, BENCH_TILE, weights)


def _resolutions(tile: int) -> list[list[int]]:
    return [[rows * tile, cols * tile] for rows, cols in GRIDS]


def _write_checkpoint(folder: Path, size: DummySize, seed: int, tile: int, weights: bool) -> Path:
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = make_tokenizer()
    config = make_config(size, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tile)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": tile},
            crop_size={"height": tile, "width": tile},
            image_grid_pinpoints=_resolutions(tile),
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    if not weights:
        return folder
    torch.manual_seed(seed)
    model = dummy_llava.scale_weights(LlavaNextForConditionalGeneration(config), size)
    model.model.image_newline.data.normal_()  # as large as the embeddings it stands between
    dummy_llava.save_weights(folder, model)
    return folder
