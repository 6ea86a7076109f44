# SPDX-License-Identifier: Apache-2.0
"""One engine step as the layers of a later stage see it: rows, lengths and KV indices.

numpy on the host: the scheduler's counts are exact there, since speculative decoding is refused.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_crop.eviction.prompt_eviction import IndexArray, PromptEviction

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LateView:
    """What one stage runs with in one step.

    Attributes:
        kv_indices: `[num_rows]`, where each row's KV entry goes in its request's late KV sequence; -1 for a
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
    def drops_rows(self) -> bool:
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
    ) -> list[LateView]:
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

    def _view(self, stage: int, step: "_Step", keep_rows: bool) -> LateView:
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
            return LateView(kv_indices, step.query_start_loc, seq_lens)
        if keep_rows:
            return LateView(np.where(keep, kv_indices, -1), step.query_start_loc, np.maximum(seq_lens, 1))
        return _without(keep, kv_indices, seq_lens, step.scheduled - (evicted_after - evicted_before))


class _Step:
    def __init__(self, slots: IndexArray, computed: IndexArray, scheduled: IndexArray) -> None:
        self.slots, self.computed, self.scheduled = slots, computed, scheduled
        self.query_start_loc = _starts(scheduled)
        within = np.arange(self.query_start_loc[-1]) - np.repeat(self.query_start_loc[:-1], scheduled)
        self.token_indices = np.repeat(computed, scheduled) + within


def _without(
    keep: npt.NDArray[np.bool_], kv_indices: IndexArray, seq_lens: Int32Array, query_lens: IndexArray
) -> LateView:
    # Attention kernels need not accept empty queries: such requests leave the batch.
    left = query_lens > 0
    return LateView(
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
