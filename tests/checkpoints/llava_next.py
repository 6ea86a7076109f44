# SPDX-License-Identifier: Apache-2.0
"""A LLaVA-NeXT checkpoint of any size with random weights, scaled as in benchmarking/dummy_llava.py."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    VOCAB_SIZE,
    DummySize,
    make_tokenizer,
)

TINY = DummySize(layers=8, branch_gain=0.6)
PATCH, TILE = 14, 140  # pixels
RESOLUTIONS = [
    [rows * TILE, cols * TILE] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
]  # in tiles those of published checkpoints


def make_config(size: DummySize, image_token_id: int) -> Any:
    """The LlavaNextConfig; its language model is a Mistral without sliding window, as in LLaVA-v1.6."""
    from transformers import LlavaNextConfig, MistralConfig

    vision = dummy_llava.make_config(size, image_token_id).vision_config
    vision.image_size = TILE
    text = MistralConfig(
        architectures=["MistralForCausalLM"],
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=size.max_positions,
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
        image_grid_pinpoints=RESOLUTIONS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float32",
        eos_token_id=1,
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = make_tokenizer()
    config = make_config(size, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=RESOLUTIONS,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(seed)
    model = dummy_llava.scale_weights(LlavaNextForConditionalGeneration(config), size)
    model.model.image_newline.data.normal_()  # as large as the embeddings it stands between
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    dummy_llava.save_weights(folder, model)
    return folder
