# SPDX-License-Identifier: Apache-2.0
"""One engine step as the layers of a later stage see it: rows, lengths and KV indices.

numpy on the host: the scheduler's counts are exact there, since speculative decoding is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec, iter_layer_specs
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

from vllm_crop.eviction.decoder import EvictingStep, StageRows
from vllm_crop.eviction.prompt_eviction import IndexArray, PromptEviction

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StageInputs:
    """What one stage runs with in one step.

    Attributes:
        kv_indices: `[num_rows]`, where each row's KV entry goes in its request's KV of this stage; -1 for a
            row whose token is evicted but kept in the batch.
        query_start_loc: `[num_reqs + 1]`.
        seq_lens: `[num_reqs]`.
        token_rows: `[num_rows]`, the rows of the step's tokens that stay; None if all do.
        req_rows: `[num_reqs]`, the requests that have a row left; None if all have.
    """

    kv_indices: IndexArray
    query_start_loc: Int32Array
    seq_lens: Int32Array
    token_rows: IndexArray | None = None
    req_rows: IndexArray | None = None

    @property
    def evicts_rows(self) -> bool:
        """Whether the stage runs with fewer rows than the step has tokens."""
        return self.token_rows is not None


class RunningEvictions:
    """The evictions of the requests a worker holds, by request slot, ready for a step's lookups."""

    def __init__(self, max_num_reqs: int, num_stages: int) -> None:
        self.num_stages = num_stages
        self._evictions: list[PromptEviction | None] = [None] * max_num_reqs
        self._ends = np.zeros(max_num_reqs, dtype=np.int64)
        self._totals = np.zeros((num_stages + 1, max_num_reqs), dtype=np.int64)

    def set(self, slot: int, eviction: PromptEviction | None) -> None:
        """Put a request's eviction into a slot, or clear it."""
        self._evictions[slot] = eviction
        self._ends[slot] = 0 if eviction is None else eviction.end
        self._totals[:, slot] = 0 if eviction is None else [len(tokens) for tokens in eviction.evicted]

    def any_in(self, slots: IndexArray) -> bool:
        """Whether any of these requests has evicted tokens."""
        return bool(self._ends[slots].any())

    def views(
        self, slots: IndexArray, computed: IndexArray, scheduled: IndexArray, keep_rows: bool = False
    ) -> list[StageInputs]:
        """The step as stages 1, 2, ... see it.

        Args:
            slots: `[num_reqs]`, in batch order.
            computed: `[num_reqs]`, tokens computed before this step.
            scheduled: `[num_reqs]`, tokens of this step.
            keep_rows: leave evicted tokens in the batch (a captured graph has a fixed number of rows); they
                write no KV entry and their output is of no use.
        """
        step = _Step(slots, computed, scheduled)
        return [self._view(stage, step, keep_rows) for stage in range(1, self.num_stages + 1)]

    def _view(self, stage: int, step: "_Step", keep_rows: bool) -> StageInputs:
        evicted_before = self._totals[stage][step.slots]
        evicted_after = evicted_before.copy()
        token_evicted_before = np.repeat(evicted_before, step.scheduled)
        keep: npt.NDArray[np.bool_] | None = None
        # Only requests in the middle of their evicted tokens need a look at their plan.
        for row in np.flatnonzero(step.computed < self._ends[step.slots]):
            eviction = self._evictions[step.slots[row]]
            assert eviction is not None
            start, stop = int(step.computed[row]), int(step.computed[row] + step.scheduled[row])
            evicted_before[row] = eviction.num_evicted(stage, start)
            evicted_after[row] = eviction.num_evicted(stage, stop)
            rows = slice(step.query_start_loc[row], step.query_start_loc[row + 1])
            tokens = np.arange(start, stop)
            token_evicted_before[rows] = np.searchsorted(eviction.evicted[stage], tokens)
            gone = eviction.tokens_within(stage, start, stop)
            if len(gone):
                keep = np.ones(len(token_evicted_before), dtype=np.bool_) if keep is None else keep
                keep[rows][gone - start] = False
        kv_indices = step.token_indices - token_evicted_before
        seq_lens = (step.computed + step.scheduled - evicted_after).astype(np.int32)
        if keep is None:
            return StageInputs(kv_indices, step.query_start_loc, seq_lens)
        if keep_rows:
            return StageInputs(np.where(keep, kv_indices, -1), step.query_start_loc, np.maximum(seq_lens, 1))
        return _without(keep, kv_indices, seq_lens, step.scheduled - (evicted_after - evicted_before))


class _Step:
    def __init__(self, slots: IndexArray, computed: IndexArray, scheduled: IndexArray) -> None:
        self.slots, self.computed, self.scheduled = slots, computed, scheduled
        self.query_start_loc = _starts(scheduled)
        within = np.arange(self.query_start_loc[-1]) - np.repeat(self.query_start_loc[:-1], scheduled)
        self.token_indices = np.repeat(computed, scheduled) + within


def _without(
    keep: npt.NDArray[np.bool_], kv_indices: IndexArray, seq_lens: Int32Array, query_lens: IndexArray
) -> StageInputs:
    # Attention kernels need not accept empty queries: such requests leave the batch.
    left = query_lens > 0
    return StageInputs(
        kv_indices=kv_indices[keep],
        query_start_loc=_starts(query_lens[left]),
        seq_lens=seq_lens[left],
        token_rows=np.flatnonzero(keep),
        req_rows=None if left.all() else np.flatnonzero(left),
    )


def _starts(lengths: IndexArray) -> Int32Array:
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts


AttentionGroups = list[list[Any]]


@dataclass(frozen=True)
class StageGroups:
    """The KV cache groups of one stage: per vLLM group id the names of its layers.

    `with_state`: those of layers that have a state instead of keys and values.
    """

    layers: Mapping[int, Sequence[str]]
    with_state: frozenset[int] = frozenset()

    def only(self, attn_groups: AttentionGroups) -> AttentionGroups:
        """Attention groups with all others emptied: vLLM builds no metadata for an empty group."""
        return [groups if group in self.layers else [] for group, groups in enumerate(attn_groups)]


def groups_by_stage(kv_cache_config: KVCacheConfig, num_stages: int) -> tuple[StageGroups, ...]:
    """The groups of stages 1, 2, ... A packed group wraps its layers' specs."""
    found: list[dict[int, Sequence[str]]] = [{} for _ in range(num_stages)]
    with_state = set()
    for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
        stages = {getattr(spec, "stage", 0) for spec in iter_layer_specs(group.kv_cache_spec)}
        assert len(stages) == 1, "a KV cache group mixes layers before and after an eviction"
        if stage := stages.pop():
            found[stage - 1][group_id] = group.layer_names
            if any(isinstance(spec, MambaSpec) for spec in iter_layer_specs(group.kv_cache_spec)):
                with_state.add(group_id)
    return tuple(StageGroups(layers, frozenset(with_state & layers.keys())) for layers in found)


def early_groups(attn_groups: AttentionGroups, stages: Iterable[StageGroups]) -> AttentionGroups:
    """Attention groups with those of all stages emptied."""
    later = {group_id for stage in stages for group_id in stage.layers}
    return [[] if group in later else groups for group, groups in enumerate(attn_groups)]


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


def evicting_step(
    num_tokens: int,
    views: Sequence[StageInputs],
    stages: Sequence[StageGroups],
    batches: Sequence[StageBatch],
    device: torch.device,
) -> EvictingStep | None:
    """What the decoder needs to drop rows, None if every stage runs with all rows."""
    if not any(view.evicts_rows for view in views):
        return None
    rows, by_stage = np.arange(num_tokens), []
    for view, stage, batch in zip(views, stages, batches, strict=True):
        left = rows if view.token_rows is None else view.token_rows
        gather = None if len(left) == len(rows) else to_device(np.searchsorted(rows, left), device)
        slot_mapping = {
            layer: batch.slot_mappings[group][: len(left)]
            for group, layers in stage.layers.items()
            for layer in layers
            if view.evicts_rows
        }
        assert all(len(slots) == len(left) for slots in slot_mapping.values())
        by_stage.append(StageRows(gather, slot_mapping))
        rows = left
    return EvictingStep(tuple(by_stage), to_device(rows, device))


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device."""
    return async_tensor_h2d(array, device=device)
