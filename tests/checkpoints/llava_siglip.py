# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and LLaVA-NeXT with the other vision tower, SigLIP, and other language models, random weights.

As llava-interleave-qwen has it; scaled as in benchmarking/dummy_llava.py.
"""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    DummySize,
    make_tokenizer,
    text_sizes,
)

TINY = DummySize(layers=8, branch_gain=0.6)
PATCH, TILE = 14, 146  # pixels: six of a tile fit no patch, as in published towers
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
EDGES = {"height": TILE, "width": TILE}


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """LLaVA-1.5's architecture with a Qwen2."""
    import transformers

    text = transformers.Qwen2Config(architectures=["Qwen2ForCausalLM"], **_text(size))
    config = transformers.LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], text_config=text, **_both(size)
    )
    images = transformers.SiglipImageProcessor(size=EDGES)
    processor = transformers.LlavaProcessor(images, num_additional_image_tokens=0, **_processing())
    model = transformers.LlavaForConditionalGeneration
    return _write(folder, config, processor, model, size, seed)


def make_next_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """LLaVA-NeXT's with a Llama."""
    import transformers

    text = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **_text(size))
    resolutions = [[rows * TILE, cols * TILE] for rows, cols in GRIDS]
    config = transformers.LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"],
        text_config=text,
        image_grid_pinpoints=resolutions,
        **_both(size),
    )
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": TILE}, crop_size=EDGES, image_grid_pinpoints=resolutions
    )
    processor = transformers.LlavaNextProcessor(images, num_additional_image_tokens=0, **_processing())
    model = transformers.LlavaNextForConditionalGeneration
    return _write(folder, config, processor, model, size, seed)


def _text(size: DummySize) -> dict[str, Any]:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return {**text_sizes(size, size.heads // 2), **ids}


def _both(size: DummySize) -> dict[str, Any]:
    from transformers import SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=2 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return {
        "vision_config": vision,
        "image_token_index": make_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "dtype": "float32",
        "eos_token_id": 1,
    }


def _processing() -> dict[str, Any]:
    return {
        "tokenizer": make_tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "full",
        "chat_template": CHAT_TEMPLATE,
        "image_token": IMAGE_TOKEN,
    }


def _write(folder: Path, config: Any, processor: Any, model_class: Any, size: DummySize, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    model = dummy_llava.scale_weights(model_class(config), size)
    for name, parameter in model.named_parameters():
        if name.endswith("image_newline"):  # as large as the embeddings it stands between
            parameter.data.normal_()
        if name.endswith("patch_embedding.weight"):  # no norm follows, as it does in CLIP
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    dummy_llava.save_weights(folder, model)
    return folder
