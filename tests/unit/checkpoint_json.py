# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a few JSON files, for tests that need no transformers."""

import json
from pathlib import Path
from typing import Any

LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "text_config": {"model_type": "llama", "num_hidden_layers": 40},
}
PROCESSOR = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}

QWEN2_5_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "num_hidden_layers": 28,
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
}
QWEN2_5_VL_PROCESSOR = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}

LLAVA_NEXT = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "text_config": {"model_type": "mistral"},
}
LLAVA_NEXT_PROCESSOR = {**PROCESSOR, "image_grid_pinpoints": LLAVA_NEXT["image_grid_pinpoints"]}

QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {"model_type": "qwen3_vl_text", "num_hidden_layers": 36},
    "vision_config": {"patch_size": 16, "spatial_merge_size": 2, "deepstack_visual_indexes": [8, 16, 24]},
}
QWEN3_VL_PROCESSOR = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "merge_size": 2,
}


def write_json(folder: Path, **files: Any) -> str:
    """Write `config=...` to config.json and so on, text as it is; returns the folder's name."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return str(folder)


def write_llava(folder: Path) -> str:
    """LLaVA-1.5-13B's geometry: 24 x 24 tokens, 40 decoder layers."""
    return write_json(folder, config=LLAVA, preprocessor_config=PROCESSOR)


def write_qwen2_5_vl(folder: Path) -> str:
    """Qwen2.5-VL-7B's geometry: a token per 28 x 28 pixels, 28 decoder layers."""
    return write_json(folder, config=QWEN2_5_VL, preprocessor_config=QWEN2_5_VL_PROCESSOR)


def write_llava_next(folder: Path) -> str:
    """LLaVA-v1.6-Mistral-7B's geometry: a tile of 24 x 24 tokens, then the tiles, 32 decoder layers."""
    return write_json(folder, config=LLAVA_NEXT, preprocessor_config=LLAVA_NEXT_PROCESSOR)


def write_qwen3_vl(folder: Path) -> str:
    """Qwen3-VL-8B's geometry: a token per 32 x 32 pixels, 36 decoder layers, deepstack after three."""
    return write_json(folder, config=QWEN3_VL, preprocessor_config=QWEN3_VL_PROCESSOR)
