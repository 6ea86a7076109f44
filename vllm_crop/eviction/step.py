# SPDX-License-Identifier: Apache-2.0
"""From a step's LateViews to attention metadata and rows of the later layers, for both model runners."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig, iter_layer_specs
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

from vllm_crop.eviction.decoder import DroppingStep, LateRows
from vllm_crop.eviction.late_view import LateView

AttentionGroups = list[list[Any]]


@dataclass(frozen=True)
class StageGroups:
    """The KV cache groups of one stage: per vLLM group id the names of its layers."""

    layers: Mapping[int, Sequence[str]]

    def only(self, attn_groups: AttentionGroups) -> AttentionGroups:
        """Attention groups with all others emptied: vLLM builds no metadata for an empty group."""
        return [groups if group in self.layers else [] for group, groups in enumerate(attn_groups)]


def groups_by_stage(kv_cache_config: KVCacheConfig, num_stages: int) -> tuple[StageGroups, ...]:
    """The groups of stages 1, 2, ... A packed group wraps its layers' specs."""
    found: list[dict[int, Sequence[str]]] = [{} for _ in range(num_stages)]
    for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
        stages = {getattr(spec, "stage", 0) for spec in iter_layer_specs(group.kv_cache_spec)}
        assert len(stages) == 1, "a KV cache group mixes layers before and after an eviction"
        if stage := stages.pop():
            found[stage - 1][group_id] = group.layer_names
    return tuple(StageGroups(layers) for layers in found)


def early_groups(attn_groups: AttentionGroups, stages: Iterable[StageGroups]) -> AttentionGroups:
    """Attention groups with those of all stages emptied."""
    late = {group_id for stage in stages for group_id in stage.layers}
    return [[] if group in late else groups for group, groups in enumerate(attn_groups)]


@dataclass(frozen=True)
class StageBatch:
    """The batch one stage runs with; sizes include padding where a captured graph has it.

    Attributes:
        query_start_loc, query_start_loc_cpu: `[num_reqs + 1]`.
        seq_lens: `[num_reqs]`, KV entries of the stage.
        seq_lens_cpu: the same on the host.
        kv_indices: `[num_tokens]`.
        block_tables: per group id `[num_reqs, blocks]`; read for the stage's groups only.
        slot_mappings: per group id `[num_tokens]`; the same.
    """

    num_reqs: int
    num_tokens: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    max_query_len: int
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    max_seq_len: int
    kv_indices: torch.Tensor
    is_prefilling: torch.Tensor
    block_tables: Any
    slot_mappings: Any


def build_metadata(
    batch: StageBatch, attn_groups: AttentionGroups, kv_cache_config: KVCacheConfig, for_capture: bool = False
) -> dict[str, Any]:
    """Attention metadata per layer of one stage; none if no row is left."""
    if not batch.num_tokens:
        return {}
    return build_attn_metadata(
        attn_groups=attn_groups,
        num_reqs=batch.num_reqs,
        num_tokens=batch.num_tokens,
        query_start_loc_gpu=batch.query_start_loc,
        query_start_loc_cpu=batch.query_start_loc_cpu,
        max_query_len=batch.max_query_len,
        seq_lens=batch.seq_lens,
        max_seq_len=batch.max_seq_len,
        block_tables=batch.block_tables,
        slot_mappings=batch.slot_mappings,
        kv_cache_config=kv_cache_config,
        seq_lens_cpu_upper_bound=batch.seq_lens_cpu,
        positions=batch.kv_indices,
        is_prefilling=batch.is_prefilling,
        for_cudagraph_capture=for_capture,
    )


def dropping_step(
    num_tokens: int,
    views: Sequence[LateView],
    stages: Sequence[StageGroups],
    batches: Sequence[StageBatch],
    device: torch.device,
) -> DroppingStep | None:
    """What the decoder needs to drop rows, None if every stage runs with all rows."""
    if not any(view.drops_rows for view in views):
        return None
    rows, late = np.arange(num_tokens), []
    for view, stage, batch in zip(views, stages, batches, strict=True):
        left = rows if view.token_rows is None else view.token_rows
        gather = None if len(left) == len(rows) else to_device(np.searchsorted(rows, left), device)
        slot_mapping = {
            layer: batch.slot_mappings[group][: len(left)]
            for group, layers in stage.layers.items()
            for layer in layers
            if view.drops_rows
        }
        assert all(len(slots) == len(left) for slots in slot_mapping.values())
        late.append(LateRows(gather, slot_mapping))
        rows = left
    return DroppingStep(tuple(late), to_device(rows, device))


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device."""
    return async_tensor_h2d(array, device=device)
