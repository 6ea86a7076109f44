# SPDX-License-Identifier: Apache-2.0
"""Reading grids and decoder depth from checkpoints' JSON."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Glm4vConfig,
    Glm4vMoeConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.gemma4 import Gemma4Geometry
from vllm_crop.families.llava import LlavaGeometry
from vllm_crop.families.llava_next import LlavaNextGeometry, LlavaOnevisionGeometry
from vllm_crop.families.not_supported import WHY_NOT
from vllm_crop.families.qwen_vl import Qwen2_5VLGeometry, Qwen3_5Geometry, Qwen3VLGeometry
from vllm_crop.families.registry import FAMILIES, geometry_from_configs
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.planning.geometry import Box, TokenGrid

# As published with llava-hf/llava-1.5-7b-hf: what equals transformers' defaults is left out.
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "text_config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32064},
    "vision_config": {"image_size": 336, "model_type": "clip_vision_model", "patch_size": 14},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LLAVA_PREPROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_resize": True,
    "size": {"shortest_edge": 336},
}


# As published with Qwen/Qwen2.5-VL-7B-Instruct, the language model's settings at the top level.
QWEN2_5_VL_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "max_position_embeddings": 128000,
    "vision_config": {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
QWEN2_5_VL_PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessor",
}
# As published with Qwen/Qwen2-VL-7B-Instruct, whose image processor is the same.
QWEN2_VL_7B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "patch_size": 14},
}
# As published with llava-hf/llava-v1.6-mistral-7b-hf.
LLAVA_NEXT_7B = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "text_config": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "vocab_size": 32064,
    },
    "vision_config": {"image_size": 336, "model_type": "clip_vision_model", "patch_size": 14},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LLAVA_NEXT_PREPROCESSOR = {
    **LLAVA_PREPROCESSOR,
    "image_grid_pinpoints": LLAVA_NEXT_7B["image_grid_pinpoints"],
    "image_processor_type": "LlavaNextImageProcessor",
}
# As published with llava-hf/llava-onevision-qwen2-7b-ov-hf, whose resolutions are transformers' default.
LLAVA_ONEVISION_7B = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28},
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "image_size": 384,
        "model_type": "siglip_vision_model",
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
LLAVA_ONEVISION_PREPROCESSOR = {
    "do_pad": True,
    "do_resize": True,
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": 384, "width": 384},
}
# As published with Qwen/Qwen3-VL-8B-Instruct.
QWEN3_VL_8B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "text_config": {"model_type": "qwen3_vl_text", "hidden_size": 4096, "num_hidden_layers": 36},
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 27,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [8, 16, 24],
        "out_hidden_size": 4096,
    },
}
QWEN3_VL_PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
# As published with Qwen/Qwen3-VL-30B-A3B-Instruct.
QWEN3_VL_30B_A3B = {
    **QWEN3_VL_8B,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {"model_type": "qwen3_vl_moe_text", "hidden_size": 2048, "num_hidden_layers": 48},
    "vision_config": {**QWEN3_VL_8B["vision_config"], "model_type": "qwen3_vl_moe", "out_hidden_size": 2048},
}
# As published with Qwen/Qwen3.5-9B and Qwen/Qwen3.5-35B-A3B, layer types left out.
QWEN3_5_9B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {"model_type": "qwen3_5_text", "hidden_size": 4096, "num_hidden_layers": 32},
    "vision_config": {
        **{"model_type": "qwen3_5_vision", "depth": 27, "out_hidden_size": 4096},
        **{"patch_size": 16, "spatial_merge_size": 2},
    },
}
QWEN3_5_35B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {"model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40},
    "vision_config": {**QWEN3_5_9B["vision_config"], "model_type": "qwen3_5_moe_vision"},
}
# As published with zai-org/GLM-4.1V-9B-Thinking.
GLM_4_1V_9B: dict[str, Any] = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "model_type": "glm4v",
    "image_token_id": 151343,
    "text_config": {"model_type": "glm4v_text", "hidden_size": 4096, "num_hidden_layers": 40},
    "vision_config": {
        "depth": 24,
        "image_size": 336,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 4096,
    },
}
GLM_PREPROCESSOR = {
    "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Glm4vImageProcessor",
}
# As published with zai-org/GLM-4.5V.
GLM_4_5V = {
    **GLM_4_1V_9B,
    "architectures": ["Glm4vMoeForConditionalGeneration"],
    "model_type": "glm4v_moe",
    "image_token_id": 151363,
    "text_config": {"model_type": "glm4v_moe_text", "hidden_size": 4096, "num_hidden_layers": 46},
}
# As published with OpenGVLab/InternVL3_5-8B-HF and OpenGVLab/InternVL3_5-8B.
INTERNVL_8B_HF: dict[str, Any] = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "text_config": {"model_type": "qwen3", "num_hidden_layers": 36},
    "vision_config": {"image_size": [448, 448], "patch_size": [14, 14]},
    "downsample_ratio": 0.5,
}
INTERNVL_PREPROCESSOR = {"size": {"height": 448, "width": 448}, "crop_to_patches": False, "max_patches": 12}
INTERNVL_8B: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "llm_config": {"model_type": "qwen3", "num_hidden_layers": 36},
    "vision_config": {"image_size": 448, "patch_size": 14},
    **{"downsample_ratio": 0.5, "force_image_size": 448, "dynamic_image_size": True, "use_thumbnail": True},
    **{"min_dynamic_patch": 1, "max_dynamic_patch": 12},
}
INTERNVL_CHAT_PREPROCESSOR = {"crop_size": 448, "size": 448, "image_processor_type": "CLIPFeatureExtractor"}
# As published with mistralai/Mistral-Small-3.1-24B-Instruct-2503.
MISTRAL_24B: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {"model_type": "mistral", "num_hidden_layers": 40},
    "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
    "spatial_merge_size": 2,
}
MISTRAL_PREPROCESSOR = {"size": {"longest_edge": 1540}, "patch_size": {"height": 14, "width": 14}}
# As published with google/gemma-4-E4B-it.
GEMMA_4_E4B: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "text_config": {"model_type": "gemma4_text", "num_hidden_layers": 42},
    "vision_config": {"patch_size": 16, "pooling_kernel_size": 3, "default_output_length": 280},
}
GEMMA_4_PREPROCESSOR = {"max_soft_tokens": 280, "patch_size": 16, "pooling_kernel_size": 3}
PUBLISHED = {
    "LlavaForConditionalGeneration": (LLAVA_7B, LLAVA_PREPROCESSOR),
    "LlavaNextForConditionalGeneration": (LLAVA_NEXT_7B, LLAVA_NEXT_PREPROCESSOR),
    "LlavaOnevisionForConditionalGeneration": (LLAVA_ONEVISION_7B, LLAVA_ONEVISION_PREPROCESSOR),
    "Qwen2VLForConditionalGeneration": (QWEN2_VL_7B, QWEN2_5_VL_PREPROCESSOR),
    "Qwen2_5_VLForConditionalGeneration": (QWEN2_5_VL_7B, QWEN2_5_VL_PREPROCESSOR),
    "Qwen3VLForConditionalGeneration": (QWEN3_VL_8B, QWEN3_VL_PREPROCESSOR),
    "Qwen3VLMoeForConditionalGeneration": (QWEN3_VL_30B_A3B, QWEN3_VL_PREPROCESSOR),
    "InternVLForConditionalGeneration": (INTERNVL_8B_HF, INTERNVL_PREPROCESSOR),
    "InternVLChatModel": (INTERNVL_8B, INTERNVL_CHAT_PREPROCESSOR),
    "Mistral3ForConditionalGeneration": (MISTRAL_24B, MISTRAL_PREPROCESSOR),
    "Qwen3_5ForConditionalGeneration": (QWEN3_5_9B, QWEN3_VL_PREPROCESSOR),
    "Qwen3_5MoeForConditionalGeneration": (QWEN3_5_35B_A3B, QWEN3_VL_PREPROCESSOR),
    "Glm4vForConditionalGeneration": (GLM_4_1V_9B, GLM_PREPROCESSOR),
    "Glm4vMoeForConditionalGeneration": (GLM_4_5V, GLM_PREPROCESSOR),
    "Gemma4ForConditionalGeneration": (GEMMA_4_E4B, GEMMA_4_PREPROCESSOR),
}


def test_published_qwen_has_a_token_per_28_pixels_and_28_layers() -> None:
    geometry = geometry_from_configs(QWEN2_5_VL_7B, QWEN2_5_VL_PREPROCESSOR)
    assert isinstance(geometry, Qwen2_5VLGeometry)
    assert geometry.num_layers == 28
    assert geometry.max_tokens == 16384
    assert geometry.grid(640, 480) == TokenGrid(17, 23)
    assert geometry.grid(3584, 3584) == TokenGrid(128, 128)
    assert geometry.view(640, 480).window == Box(0.0, 0.0, 1.0, 1.0)
    assert geometry.position_span(TokenGrid(17, 23)) == 23


def test_published_llava_next_has_a_tile_of_the_whole_image_and_a_grid_of_the_others() -> None:
    geometry = geometry_from_configs(LLAVA_NEXT_7B, LLAVA_NEXT_PREPROCESSOR)
    assert isinstance(geometry, LlavaNextGeometry)
    assert (geometry.num_layers, geometry.max_tokens) == (32, 2928)
    whole, tiles = geometry.grid(640, 480).parts
    assert (whole.grid, tiles.grid) == (TokenGrid(24, 24), TokenGrid(36, 48))
    assert (whole.newlines, tiles.newlines, tiles.first) == (False, True, 576)
    assert geometry.grid(640, 480).num_tokens == geometry.position_span(geometry.grid(640, 480)) == 2340
    assert geometry.view(640, 480).window == Box(0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("from_file", [True, False])
def test_the_loaded_config_of_llava_next_gives_the_same_geometry(tmp_path: Path, from_file: bool) -> None:
    config = LlavaNextConfig(**LLAVA_NEXT_7B)
    config.save_pretrained(tmp_path)
    loaded = LlavaNextConfig.get_config_dict(tmp_path)[0] if from_file else config.to_dict()
    published = geometry_from_configs(LLAVA_NEXT_7B, LLAVA_NEXT_PREPROCESSOR)
    assert geometry_from_configs(loaded, LLAVA_NEXT_PREPROCESSOR) == published
    assert (
        geometry_from_configs(loaded, LlavaNextImageProcessor(**LLAVA_NEXT_PREPROCESSOR).to_dict())
        == published
    )


def test_published_onevision_has_grids_that_are_scaled_down() -> None:
    geometry = geometry_from_configs(LLAVA_ONEVISION_7B, LLAVA_ONEVISION_PREPROCESSOR)
    assert isinstance(geometry, LlavaOnevisionGeometry)
    assert (geometry.num_layers, geometry.max_tokens) == (28, 8829)
    assert [part.grid for part in geometry.grid(1153, 944).parts] == [TokenGrid(27, 27), TokenGrid(81, 98)]
    assert geometry.grid(4000, 3000).parts[1].grid == TokenGrid(70, 93)
    assert geometry.view(640, 480).window == Box(0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("from_file", [True, False])
def test_the_loaded_config_of_onevision_gives_the_same_geometry(tmp_path: Path, from_file: bool) -> None:
    config = LlavaOnevisionConfig(**LLAVA_ONEVISION_7B)
    config.save_pretrained(tmp_path)
    loaded = LlavaOnevisionConfig.get_config_dict(tmp_path)[0] if from_file else config.to_dict()
    published = geometry_from_configs(LLAVA_ONEVISION_7B, LLAVA_ONEVISION_PREPROCESSOR)
    settings = LlavaOnevisionImageProcessor(**LLAVA_ONEVISION_PREPROCESSOR).to_dict()
    assert geometry_from_configs(loaded, LLAVA_ONEVISION_PREPROCESSOR) == published
    assert geometry_from_configs(loaded, settings) == published


def test_published_qwen3_has_a_token_per_32_pixels_and_deepstack_below_layer_3() -> None:
    geometry = geometry_from_configs(QWEN3_VL_8B, QWEN3_VL_PREPROCESSOR)
    assert isinstance(geometry, Qwen3VLGeometry)
    assert geometry.num_layers == 36
    assert geometry.first_eviction_layer == 3
    assert geometry.max_tokens == 16384
    assert geometry.grid(640, 480) == TokenGrid(15, 20)
    assert geometry.grid(100, 50) == TokenGrid(6, 12)  # enlarged to 256 x 256 pixels at least
    assert geometry.grid(8192, 8192) == TokenGrid(128, 128)
    assert geometry.view(640, 480).window == Box(0.0, 0.0, 1.0, 1.0)


def test_of_published_qwen3_5_every_fourth_layer_looks() -> None:
    for model, last in ((QWEN3_5_9B, 31), (QWEN3_5_35B_A3B, 39)):
        geometry = geometry_from_configs(model, QWEN3_VL_PREPROCESSOR)
        assert isinstance(geometry, Qwen3_5Geometry)
        assert list(geometry.looking_layers) == list(range(3, last + 1, 4))
        assert geometry.first_eviction_layer == 1
        assert geometry.grid(640, 480) == TokenGrid(15, 20)
        text = {**model["text_config"], "mamba_ssm_dtype": "float32"}  # as published
        of_a_state = 3 * (2 * 16 * 128 + 32 * 128) * 2 + 32 * 128 * 128 * 4  # bytes
        of_a_token = 2 * 256 * 2 * (4 if last == 31 else 2)
        tokens = geometry_from_configs({**model, "text_config": text}, QWEN3_VL_PREPROCESSOR).state_tokens
        assert (tokens - 1) * of_a_token < of_a_state <= tokens * of_a_token
    deepstack = {**QWEN3_5_9B, "vision_config": {**QWEN3_5_9B["vision_config"]}}
    deepstack["vision_config"]["deepstack_visual_indexes"] = [8, 16]
    with pytest.raises(UnsupportedModelError, match="deepstack_visual_indexes"):
        geometry_from_configs(deepstack, QWEN3_VL_PREPROCESSOR)


@pytest.mark.parametrize(
    ("model", "preprocessor"),
    [(INTERNVL_8B_HF, INTERNVL_PREPROCESSOR), (INTERNVL_8B, INTERNVL_CHAT_PREPROCESSOR)],
    ids=["transformers", "OpenGVLab"],
)
def test_published_internvl_has_tiles_of_256_and_a_small_one_after_them(
    model: dict[str, Any], preprocessor: dict[str, Any]
) -> None:
    geometry = geometry_from_configs(model, preprocessor)
    assert geometry.num_layers == 36
    assert geometry.max_tokens == 13 * 256
    grid = geometry.grid(1024, 1024)  # as many as a half of their pixels still shows
    assert [part.grid for part in grid.parts] == [TokenGrid(16, 16)] * 10
    assert grid.parts[5].window == Box(2 / 3, 1 / 3, 1.0, 2 / 3)
    assert grid.parts[-1].window == Box(0.0, 0.0, 1.0, 1.0)
    assert geometry.grid(300, 300) == TokenGrid(16, 16)  # a single tile needs no small one
    wrong = {**model, "vision_config": {"image_size": [448, 336], "patch_size": 14}}
    with pytest.raises(UnsupportedModelError, match="no squares"):
        geometry_from_configs(wrong, preprocessor)


def test_internvl_is_cut_as_the_server_was_told() -> None:
    told = {**INTERNVL_CHAT_PREPROCESSOR, "max_dynamic_patch": 4, "use_thumbnail": False}
    geometry = geometry_from_configs(INTERNVL_8B, told)
    assert geometry.max_tokens == 4 * 256
    assert geometry_from_configs(INTERNVL_8B, {"dynamic_image_size": False}).max_tokens == 256
    fewer = geometry_from_configs(INTERNVL_8B_HF, {**INTERNVL_PREPROCESSOR, "max_patches": 1})
    assert fewer.max_tokens == 256
    with pytest.raises(UnsupportedModelError, match="image_size 224 is not the vision tower's"):
        geometry_from_configs(INTERNVL_8B, {"image_size": 224})
    with pytest.raises(UnsupportedModelError, match="image processor's size"):
        geometry_from_configs(INTERNVL_8B_HF, {"size": {"height": 384, "width": 384}})


def test_published_mistral3_has_a_token_per_28_pixels_and_breaks() -> None:
    geometry = geometry_from_configs(MISTRAL_24B, MISTRAL_PREPROCESSOR)
    assert geometry.num_layers == 40
    assert geometry.max_tokens == 55 * 55 + 54
    upper, last = geometry.grid(1024, 1024).parts
    assert (upper.grid, upper.newlines) == (TokenGrid(36, 37), True)
    assert (last.grid, last.newlines, last.first) == (TokenGrid(1, 37), False, 36 * 38)
    assert geometry.pixels(1024, 1024) == (37 * 28, 37 * 28)
    assert geometry.grid(500, 20) == TokenGrid(1, 18)
    with pytest.raises(UnsupportedModelError, match="'siglip_vision_model'"):
        geometry_from_configs({**MISTRAL_24B, "vision_config": {"model_type": "siglip_vision_model"}}, {})
    with pytest.raises(UnsupportedModelError, match="no 'longest_edge'"):
        geometry_from_configs(MISTRAL_24B, {"size": {"height": 336, "width": 336}})


def test_published_gemma4_has_a_token_per_48_pixels_and_five_budgets() -> None:
    geometry = geometry_from_configs(GEMMA_4_E4B, GEMMA_4_PREPROCESSOR)
    assert isinstance(geometry, Gemma4Geometry)
    assert (geometry.num_layers, geometry.max_tokens) == (42, 280)
    assert geometry.grid(1024, 1024) == TokenGrid(16, 16)
    assert geometry.pixels(1024, 512) == (23 * 48, 11 * 48)
    assert geometry.grid(3, 900) == TokenGrid(280, 1)
    tokens = [
        sum(piece.num_tokens for piece in geometry.small(1024, 1024, bound))
        for bound in (63, 64, 120, 121, 139, 255)
    ]
    assert tokens == [0, 64, 64, 121, 121, 121]
    larger = geometry_from_configs(GEMMA_4_E4B, {**GEMMA_4_PREPROCESSOR, "max_soft_tokens": 1120})
    assert larger.grid(1024, 1024) == TokenGrid(33, 33)
    with pytest.raises(UnsupportedModelError, match="max_soft_tokens 300 is none of"):
        geometry_from_configs(GEMMA_4_E4B, {"max_soft_tokens": 300})


QWEN_LINE = {
    "Qwen2VLForConditionalGeneration": Qwen2VLConfig,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLConfig,
    "Qwen3VLForConditionalGeneration": Qwen3VLConfig,
    "Qwen3VLMoeForConditionalGeneration": Qwen3VLMoeConfig,
    "Qwen3_5ForConditionalGeneration": Qwen3_5Config,
    "Qwen3_5MoeForConditionalGeneration": Qwen3_5MoeConfig,
    "Glm4vForConditionalGeneration": Glm4vConfig,
    "Glm4vMoeForConditionalGeneration": Glm4vMoeConfig,
}


@pytest.mark.parametrize("architecture", QWEN_LINE)
@pytest.mark.parametrize("from_file", [True, False])
def test_the_loaded_config_of_the_qwen_line_gives_the_same_geometry(
    tmp_path: Path, from_file: bool, architecture: str
) -> None:
    model, preprocessor = PUBLISHED[architecture]
    config = QWEN_LINE[architecture].from_dict(model)
    config.save_pretrained(tmp_path)
    loaded = type(config).get_config_dict(tmp_path)[0] if from_file else config.to_dict()
    assert geometry_from_configs(loaded, preprocessor) == geometry_from_configs(model, preprocessor)


@pytest.mark.parametrize("architecture", QWEN_LINE)
def test_a_bare_model_of_the_qwen_line_has_transformers_defaults(architecture: str) -> None:
    default = QWEN_LINE[architecture](architectures=[architecture])
    bare = {"architectures": [architecture], "model_type": default.model_type}
    assert geometry_from_configs(bare, {}) == geometry_from_configs(default.to_dict(), {})
    assert geometry_from_configs(bare, {}).num_layers == default.text_config.num_hidden_layers


def test_an_image_processor_that_does_not_fit_the_tower_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="patch_size and merge_size"):
        geometry_from_configs(QWEN2_5_VL_7B, {**QWEN2_5_VL_PREPROCESSOR, "merge_size": 4})


def test_published_llava_has_24_by_24_tokens_and_32_layers() -> None:
    geometry = geometry_from_configs(LLAVA_7B, LLAVA_PREPROCESSOR)
    assert isinstance(geometry, LlavaGeometry)
    assert geometry.num_layers == 32
    assert geometry.grid(640, 480) == geometry.grid(1, 1) == TokenGrid(24, 24)
    assert geometry.view(640, 480).window == Box(0.125, 0.0, 0.875, 1.0)


def test_the_file_of_a_checkpoint_and_the_loaded_config_give_the_same_geometry(tmp_path: Path) -> None:
    config = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    config.text_config.num_hidden_layers = 7
    config.save_pretrained(tmp_path)
    from_file, _ = LlavaConfig.get_config_dict(tmp_path)
    assert geometry_from_configs(from_file, {}) == geometry_from_configs(config.to_dict(), {})
    assert geometry_from_configs(from_file, {}).num_layers == 7


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_layers_left_out_of_config_json_are_transformers_defaults(model_type: str) -> None:
    default = AutoConfig.for_model(model_type).num_hidden_layers
    assert decoder_layers({"model_type": model_type}) == default


def test_written_layers_win_over_defaults() -> None:
    assert decoder_layers({"model_type": "llama", "num_hidden_layers": 40}) == 40
    assert decoder_layers({"num_hidden_layers": 5, "model_type": "of our own"}) == 5
    assert decoder_layers({}) == 32


def test_unknown_text_models_without_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers for 'gpt9'"):
        decoder_layers({"model_type": "gpt9"})


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_our_own_architecture_names_are_recognised(architecture: str) -> None:
    model, preprocessor = PUBLISHED[architecture]
    stock = geometry_from_configs(model, preprocessor)
    ours = geometry_from_configs({**model, "architectures": [f"Crop{architecture}"]}, preprocessor)
    assert ours == stock


@pytest.mark.parametrize(
    "architectures", [None, [], ["LlamaForCausalLM"], ["LlavaNextVideoForConditionalGeneration"]]
)
def test_other_architectures_are_refused_naming_the_supported_ones(architectures: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="LlavaForConditionalGeneration"):
        geometry_from_configs({**LLAVA_7B, "architectures": architectures}, {})


@pytest.mark.parametrize("architecture", sorted(WHY_NOT))
def test_models_that_people_ask_for_are_refused_with_the_reason(architecture: str) -> None:
    assert architecture not in FAMILIES
    with pytest.raises(UnsupportedModelError, match=re.escape(WHY_NOT[architecture])):
        geometry_from_configs({"architectures": [architecture]}, {})


def test_other_vision_towers_are_refused() -> None:
    vision = {"model_type": "pixtral", "image_size": 1024, "patch_size": 16}
    for model, known in (
        (LLAVA_7B, "'clip_vision_model' or 'siglip_vision_model'"),
        (LLAVA_NEXT_7B, "'clip_vision_model' or 'siglip_vision_model'"),
        (LLAVA_ONEVISION_7B, "'siglip_vision_model'"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"'pixtral' is not supported: .* needs {known}"):
            geometry_from_configs({**model, "vision_config": vision}, {})


def test_a_siglip_tower_has_no_class_token_and_no_centre_crop() -> None:
    siglip = {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
        "vision_feature_select_strategy": "full",
    }
    preprocessor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}}
    for settings in (preprocessor, {**preprocessor, "image_processor_type": "SiglipImageProcessorFast"}):
        geometry = geometry_from_configs({**LLAVA_7B, **siglip}, settings)
        assert (geometry.max_tokens, geometry.grid(640, 480)) == (729, TokenGrid(27, 27))
        assert geometry.view(640, 480).window == Box(0.0, 0.0, 1.0, 1.0)
    grids = [[384 * rows, 384 * cols] for rows, cols in ((1, 2), (2, 1), (2, 2))]
    tiles = {"size": {"shortest_edge": 384}, "crop_size": 384, "image_grid_pinpoints": grids}
    next_one = {**LLAVA_NEXT_7B, **siglip, "image_grid_pinpoints": grids}
    whole, larger = geometry_from_configs(next_one, tiles).grid(800, 800).parts
    assert (whole.grid, larger.grid) == (TokenGrid(27, 27), TokenGrid(54, 54))
    with pytest.raises(UnsupportedModelError, match=r"'default' is not supported with a siglip_vision_model"):
        geometry_from_configs({**next_one, "vision_feature_select_strategy": "default"}, tiles)


def test_checkpoints_that_keep_the_class_token_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vision_feature_select_strategy='full'"):
        geometry_from_configs({**LLAVA_7B, "vision_feature_select_strategy": "full"}, {})


def test_image_processor_settings_that_are_not_understood_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="longest_edge"):
        geometry_from_configs(LLAVA_7B, {"size": {"longest_edge": 336}})


def test_a_tower_whose_sizes_are_left_out_has_those_of_clip() -> None:
    geometry = geometry_from_configs({**LLAVA_7B, "vision_config": {"model_type": "clip_vision_model"}}, {})
    assert geometry.grid(1, 1) == TokenGrid(7, 7)


def test_a_checkpoint_without_a_vision_config_has_transformers_default_tower() -> None:
    bare = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    loaded = LlavaConfig.from_dict(bare)
    assert geometry_from_configs(bare, {}).grid(1, 1) == geometry_from_configs(loaded.to_dict(), {}).grid(
        1, 1
    )
