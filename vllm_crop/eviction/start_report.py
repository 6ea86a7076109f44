# SPDX-License-Identifier: Apache-2.0
"""Compares vLLM's KV cache groups with what was expected, and says at start what eviction will save."""

import logging
import os
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig, iter_layer_specs

from vllm_crop.budget import method_evicts, retained_per_stage
from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedFlagError
from vllm_crop.eviction.grouping import KVGrouping, predict_grouping, predict_packed_grouping
from vllm_crop.eviction.grouping_report import describe, warning
from vllm_crop.vision_geometry import geometry_from_configs

logger = logging.getLogger("vllm.plugins.crop")


def packed_layout() -> bool:
    """Whether blocks are outermost in the KV cache, so that stages can have blocks of different sizes.

    The variable is final: vLLM refuses to start if the attention backend lacks the layout. Its own choice is
    not settled yet when layers are asked for their specs.
    """
    return os.environ.get("VLLM_KV_CACHE_LAYOUT", "").upper().startswith("BL")


def expected_grouping(num_layers: int, stages: tuple[int, ...], block_size: int) -> KVGrouping:
    """The KV cache groups vLLM should make."""
    predict = predict_packed_grouping if packed_layout() else predict_grouping
    return predict(num_layers, stages, block_size)


def report_start(
    kv_cache_config: KVCacheConfig, hf_config: Any, stages: tuple[int, ...], block_size: int
) -> None:
    """Log groups, padding and expected KV.

    Raises:
        UnsupportedFlagError: vLLM has grouped the layers otherwise than expected.
    """
    geometry = geometry_from_configs(hf_config.to_dict(), {})
    if packed_layout():
        sizes = built_block_sizes(kv_cache_config)
        expected = predict_packed_grouping(geometry.num_layers, stages, min(sizes), sizes)
    else:
        expected = predict_grouping(geometry.num_layers, stages, block_size)
    found = built_groups(kv_cache_config)
    if found != sorted((group.stage, group.num_layers) for group in expected.groups):
        raise UnsupportedFlagError(
            f"vLLM made KV cache groups (stage, layers) {found} for eviction layers {list(stages)}, expected "
            f"{expected.groups}: leave out VLLM_KV_CACHE_LAYOUT and --kv-cache-dtype-skip-layers, or tell us"
        )
    config = CropConfig.from_mapping(hf_config.crop)
    image_tokens = getattr(hf_config, "crop_max_image_tokens", geometry.max_tokens)
    method = config.method if method_evicts(config.method) else "plc+ilp"
    kept = retained_per_stage(image_tokens, config.pruning_rate, method, geometry.num_layers, stages)
    for line in describe(expected, image_tokens, kept):
        logger.info(line)
    if wasteful := warning(expected, geometry.first_eviction_layer):
        logger.warning(wasteful)


def built_groups(kv_cache_config: KVCacheConfig) -> list[tuple[int, int]]:
    """Stage and number of layers of every KV cache group, sorted."""
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        stages = {getattr(spec, "stage", 0) for spec in iter_layer_specs(group.kv_cache_spec)}
        groups.append((max(stages), len(group.layer_names)))
    return sorted(groups)


def built_block_sizes(kv_cache_config: KVCacheConfig) -> tuple[int, ...]:
    """Tokens per block of stages 0, 1, ..."""
    sizes = {}
    for group in kv_cache_config.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            sizes[getattr(spec, "stage", 0)] = spec.block_size
    return tuple(sizes[stage] for stage in sorted(sizes))
