# SPDX-License-Identifier: Apache-2.0
"""The sizes of published checkpoints: what their config.json and image processor's settings say, no weights.

Tiny checkpoints hide sizes. A published one is written over a tiny one, whose tokenizer it keeps: what its
settings decide can then be asked of vLLM itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.families import (
    GLM4V,
    GLM4V_MOE,
    INTERNVL,
    INTERNVL_CHAT,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    LLAVA_SIGLIP,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Family,
)

_QWEN2_PIXELS = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
_QWEN3_PIXELS = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
_SIGLIP_SIDES = range(384, 2305, 384)
_SIGLIP_GRIDS = [[one, other] for one in _SIGLIP_SIDES for other in _SIGLIP_SIDES]
_CLIP_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Published:
    """A checkpoint on the Hub.

    Attributes:
        name: of the repository.
        text, vision: the values of `text_config` and `vision_config` that sizes depend on.
        top: values beside them.
        processor: the image processor's settings that differ from the tiny checkpoint's.
        beside: those of the processor it is part of.
    """

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    top: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)

    def write(self, family: Family, folder: Path) -> Path:
        """A checkpoint folder without weights, in published sizes."""
        family.make_checkpoint(folder, family.shallow)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        text = config.get("text_config") or config.get("llm_config") or config
        text.update(self.text)
        text.pop("layer_types", None)  # of each layer of the tiny one
        config["vision_config"].update(self.vision)
        config.update(self.top)
        path.write_text(json.dumps(config))
        settings_path = folder / "processor_config.json"
        if settings_path.exists():
            settings = json.loads(settings_path.read_text())
            settings["image_processor"].update(self.processor)
            settings_path.write_text(json.dumps({**settings, **self.beside}))
        (folder / "model.safetensors").unlink()
        return folder


_QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
_QWEN2_TEXT = {
    **{"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
_QWEN3_VISION = {
    **{"depth": 27, "hidden_size": 1152, "num_heads": 16, "out_hidden_size": 4096},
    **{"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
}
_QWEN3_ROPE = {
    **{"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True},
    "mrope_section": [24, 20, 20],
}
_INTERNVL_TEXT = {
    **{"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128},
    **{"num_key_value_heads": 8, "max_position_embeddings": 40960},
}
_INTERNVL_VISION = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_QWEN3_5_TEXT = {
    **{"head_dim": 256, "full_attention_interval": 4, "max_position_embeddings": 262144},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        **{"mrope_interleaved": True, "mrope_section": [11, 11, 10]},
    },
}
_QWEN3_5_VISION = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "num_position_embeddings": 2304}
# Of both models' config.json and preprocessor_config.json: transformers' defaults, and public copies of them.
_GLM_VISION = {
    **{"depth": 24, "hidden_size": 1536, "num_heads": 12, "out_hidden_size": 4096, "image_size": 336},
    "patch_size": 14,
}
_GLM_ROPE = {
    **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "mrope_section": [8, 12, 12],
}
_GLM_TEXT = {"hidden_size": 4096, "max_position_embeddings": 65536, "rope_parameters": _GLM_ROPE}
_GLM_PIXELS = {"size": {"shortest_edge": 12544, "longest_edge": 9633792}}
PUBLISHED: dict[Family, Published] = {
    LLAVA: Published(
        "llava-hf/llava-1.5-7b-hf",
        {
            **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 32, "max_position_embeddings": 4096},
        },
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        {},
    ),
    LLAVA_SIGLIP: Published(
        "llava-hf/llava-interleave-qwen-7b-hf",
        {
            **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 32, "max_position_embeddings": 32768},
        },
        {
            **{"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 16},
            **{"image_size": 384, "patch_size": 14},
        },
        {},
        {"size": {"height": 384, "width": 384}},
    ),
    LLAVA_NEXT: Published(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        {
            **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 8, "max_position_embeddings": 32768},
        },
        {
            **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
            **{"image_size": 336, "patch_size": 14},
        },
        {"image_grid_pinpoints": _CLIP_GRIDS},
        {
            **{"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
            "image_grid_pinpoints": _CLIP_GRIDS,
        },
    ),
    LLAVA_ONEVISION: Published(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        {
            **{"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28},
            **{"num_key_value_heads": 4, "max_position_embeddings": 32768},
        },
        {
            **{"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 16},
            **{"image_size": 384, "patch_size": 14},
        },
        {"image_grid_pinpoints": _SIGLIP_GRIDS},
        {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": _SIGLIP_GRIDS},
    ),
    QWEN2_VL: Published("Qwen/Qwen2-VL-7B-Instruct", _QWEN2_TEXT, _QWEN2_VISION, {}, _QWEN2_PIXELS),
    QWEN2_5_VL: Published(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        {**_QWEN2_TEXT, "max_position_embeddings": 128000},
        {
            **{"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584},
            **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
        },
        {},
        _QWEN2_PIXELS,
    ),
    QWEN3_VL: Published(
        "Qwen/Qwen3-VL-8B-Instruct",
        {
            **{"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 8, "max_position_embeddings": 262144, "rope_parameters": _QWEN3_ROPE},
        },
        _QWEN3_VISION,
        {},
        _QWEN3_PIXELS,
    ),
    QWEN3_VL_MOE: Published(
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        {
            **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 4, "max_position_embeddings": 262144, "rope_parameters": _QWEN3_ROPE},
        },
        {**_QWEN3_VISION, "out_hidden_size": 2048},
        {},
        _QWEN3_PIXELS,
    ),
    QWEN3_5: Published(
        "Qwen/Qwen3.5-9B",
        {
            **_QWEN3_5_TEXT,
            **{"hidden_size": 4096, "num_hidden_layers": 32},
            **{"num_attention_heads": 16, "num_key_value_heads": 4},
        },
        {**_QWEN3_5_VISION, "out_hidden_size": 4096},
        {},
        _QWEN3_PIXELS,
    ),
    QWEN3_5_MOE: Published(
        "Qwen/Qwen3.5-35B-A3B",
        {
            **_QWEN3_5_TEXT,
            **{"hidden_size": 2048, "num_hidden_layers": 40},
            **{"num_attention_heads": 16, "num_key_value_heads": 2},
        },
        {**_QWEN3_5_VISION, "out_hidden_size": 2048},
        {},
        _QWEN3_PIXELS,
    ),
    INTERNVL: Published(
        "OpenGVLab/InternVL3_5-8B-HF",
        _INTERNVL_TEXT,
        {**_INTERNVL_VISION, "image_size": [448, 448], "patch_size": [14, 14]},
        {"image_seq_length": 256},
        {"size": {"height": 448, "width": 448}},
        {"image_seq_length": 256},
    ),
    INTERNVL_CHAT: Published(
        "OpenGVLab/InternVL3_5-8B",
        _INTERNVL_TEXT,
        {**_INTERNVL_VISION, "image_size": 448, "patch_size": 14},
        {"force_image_size": 448},
    ),
    MISTRAL3: Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        {
            **{"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 8, "max_position_embeddings": 131072},
        },
        {
            **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
            **{"image_size": 1540, "patch_size": 14},
        },
        {},
        {"size": {"longest_edge": 1540}},
    ),
    GLM4V: Published(
        "zai-org/GLM-4.1V-9B-Thinking",
        {**_GLM_TEXT, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2},
        {**_GLM_VISION, "intermediate_size": 13696},
        {},
        _GLM_PIXELS,
    ),
    GLM4V_MOE: Published(
        "zai-org/GLM-4.5V",
        {
            **_GLM_TEXT,
            **{"num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128},
            **{"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408},
        },
        {**_GLM_VISION, "intermediate_size": 10944},
        {},
        _GLM_PIXELS,
    ),
}
