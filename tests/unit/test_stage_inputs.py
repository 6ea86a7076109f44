# SPDX-License-Identifier: Apache-2.0
"""A step as later stages see it, against a loop over every token of the batch."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_crop.eviction.prompt_eviction import IndexArray, PromptEviction, from_leaving_stages
from vllm_crop.eviction.stage_inputs import RunningEvictions, StageInputs

MAX_NUM_REQS = 8


@dataclass(frozen=True)
class Running:
    """A request: per prompt token the stage it leaves at, 0 for never."""

    leaves_at: tuple[int, ...]

    def eviction(self, num_stages: int) -> PromptEviction | None:
        """Its eviction, None if nothing leaves."""
        leaving = [
            (stage, np.array([t for t, at in enumerate(self.leaves_at) if at == stage], dtype=np.int64))
            for stage in range(num_stages, 0, -1)
        ]
        return from_leaving_stages(leaving, num_stages) if any(self.leaves_at) else None

    def is_kept(self, stage: int, token: int) -> bool:
        """Whether the stage runs with a token of prompt or answer."""
        return token >= len(self.leaves_at) or not 0 < self.leaves_at[token] <= stage

    def num_kept(self, stage: int, num_tokens: int) -> int:
        """KV entries of the first tokens."""
        return sum(self.is_kept(stage, token) for token in range(num_tokens))


def requests(num_stages: int) -> st.SearchStrategy[Running]:
    """Prompts in which runs leave together, or nothing leaves at all; the last token stays."""
    run = st.tuples(st.integers(0, num_stages), st.integers(1, 12))
    runs = st.lists(run, max_size=5)
    return runs.map(lambda found: Running((*(at for at, length in found for _ in range(length)), 0)))


@dataclass(frozen=True)
class Batch:
    """One step: per batch row a request, its slot, tokens computed and scheduled."""

    num_stages: int
    requests: list[Running]
    slots: list[int]
    computed: list[int]
    scheduled: list[int]

    def running(self) -> RunningEvictions:
        """The worker's state, other slots filled with evictions that must not matter."""
        running = RunningEvictions(MAX_NUM_REQS, self.num_stages)
        other = Running((1,) * 40).eviction(self.num_stages)
        for slot in range(MAX_NUM_REQS):
            running.set(slot, other)
        for slot, request in zip(self.slots, self.requests, strict=True):
            running.set(slot, request.eviction(self.num_stages))
        return running

    def arrays(self) -> tuple[IndexArray, IndexArray, IndexArray]:
        """As a model runner gives them."""
        return np.array(self.slots), np.array(self.computed), np.array(self.scheduled)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """One to eight requests anywhere in prompt or answer, in any slots."""
    num_stages = draw(st.integers(1, 3))
    found = draw(st.lists(requests(num_stages), min_size=1, max_size=MAX_NUM_REQS))
    slots = draw(st.permutations(range(MAX_NUM_REQS)))[: len(found)]
    computed = [draw(st.integers(0, len(request.leaves_at) + 4)) for request in found]
    scheduled = [
        draw(st.integers(1, max(1, len(request.leaves_at) - start)))
        for request, start in zip(found, computed, strict=True)
    ]
    return Batch(num_stages, found, slots, computed, scheduled)


def brute_force(batch: Batch, stage: int, keep_rows: bool) -> StageInputs:
    """Token by token."""
    kv_indices, token_rows, starts, seq_lens, req_rows = [], [], [0], [], []
    row = 0
    gone = any(
        not request.is_kept(stage, token)
        for request, start, count in zip(batch.requests, batch.computed, batch.scheduled, strict=True)
        for token in range(start, start + count)
    )
    for req_row, (request, start, count) in enumerate(
        zip(batch.requests, batch.computed, batch.scheduled, strict=True)
    ):
        rows_before = len(kv_indices)
        for token in range(start, start + count):
            if request.is_kept(stage, token):
                kv_indices.append(request.num_kept(stage, token))
                token_rows.append(row)
            elif keep_rows:
                kv_indices.append(-1)
            row += 1
        seq_len = request.num_kept(stage, start + count)
        if keep_rows or len(kv_indices) > rows_before:
            req_rows.append(req_row)
            starts.append(len(kv_indices))
            seq_lens.append(max(seq_len, 1) if keep_rows and gone else seq_len)
    return StageInputs(
        np.array(kv_indices, dtype=np.int64),
        np.array(starts, dtype=np.int32),
        np.array(seq_lens, dtype=np.int32),
        np.array(token_rows, dtype=np.int64) if gone and not keep_rows else None,
        np.array(req_rows, dtype=np.int64) if len(req_rows) < len(batch.requests) else None,
    )


def as_lists(view: StageInputs) -> dict[str, list[int] | None]:
    """To compare and to print."""
    return {name: None if array is None else array.tolist() for name, array in vars(view).items()}


@given(batches(), st.booleans())
def test_every_stage_sees_what_a_loop_over_tokens_sees(batch: Batch, keep_rows: bool) -> None:
    running = batch.running()

    views = running.views(*batch.arrays(), keep_rows=keep_rows)

    assert len(views) == batch.num_stages
    for stage, view in enumerate(views, start=1):
        assert as_lists(view) == as_lists(brute_force(batch, stage, keep_rows))
        assert view.evicts_rows == (view.token_rows is not None)
        assert view.query_start_loc.dtype == view.seq_lens.dtype == np.int32
    slots = batch.arrays()[0]
    assert running.any_in(slots) == any(any(request.leaves_at) for request in batch.requests)


@given(batches())
def test_rows_that_attention_kernels_may_rely_on(batch: Batch) -> None:
    slots, computed, scheduled = batch.arrays()
    for view in batch.running().views(slots, computed, scheduled):
        lengths = np.diff(view.query_start_loc)
        assert (lengths > 0).all()
        assert (view.seq_lens >= lengths).all(), "every query sees at least itself"
        assert len(view.kv_indices) == view.query_start_loc[-1]
        for start, stop, seq_len in zip(
            view.query_start_loc[:-1], view.query_start_loc[1:], view.seq_lens, strict=True
        ):
            # The rows of a request are the last entries of its KV sequence, without a gap.
            expected = np.arange(seq_len - (stop - start), seq_len)
            assert view.kv_indices[start:stop].tolist() == expected.tolist()
    for view in batch.running().views(slots, computed, scheduled, keep_rows=True):
        assert len(view.kv_indices) == scheduled.sum()
        assert np.diff(view.query_start_loc).tolist() == scheduled.tolist()


@given(st.data(), st.integers(1, 3), st.booleans())
def test_chunks_write_every_kept_token_once_and_in_order(
    data: st.DataObject, num_stages: int, keep_rows: bool
) -> None:
    request = data.draw(requests(num_stages))
    num_tokens = len(request.leaves_at) + data.draw(st.integers(0, 5), label="answer tokens")
    running = RunningEvictions(MAX_NUM_REQS, num_stages)
    running.set(3, request.eviction(num_stages))
    written: list[list[tuple[int, int]]] = [[] for _ in range(num_stages)]  # token, KV index
    computed = 0
    while computed < num_tokens:
        count = data.draw(st.integers(1, num_tokens - computed), label="chunk")
        views = running.views(np.array([3]), np.array([computed]), np.array([count]), keep_rows=keep_rows)
        for stage, view in enumerate(views):
            rows = range(count) if view.token_rows is None else view.token_rows.tolist()
            for row, index in zip(rows, view.kv_indices.tolist(), strict=True):
                if index >= 0:
                    written[stage].append((computed + row, index))
        computed += count
    for stage, tokens in enumerate(written, start=1):
        kept = [token for token in range(num_tokens) if request.is_kept(stage, token)]
        assert tokens == [(token, index) for index, token in enumerate(kept)]


def test_steps_without_an_evicted_token_keep_all_rows_and_requests() -> None:
    running = RunningEvictions(2, 1)
    running.set(1, Running((1, 1, 1, 0)).eviction(1))

    (view,) = running.views(np.array([1, 0]), np.array([4, 9]), np.array([1, 1]))

    assert not view.evicts_rows
    assert view.req_rows is None
    assert view.kv_indices.tolist() == [1, 9]
    assert view.seq_lens.tolist() == [2, 10]


def test_no_row_may_be_left() -> None:
    running = RunningEvictions(1, 1)
    running.set(0, Running((1, 1, 1, 0)).eviction(1))

    (view,) = running.views(np.array([0]), np.array([0]), np.array([3]))
    assert view.token_rows is not None
    assert as_lists(view) == {
        "kv_indices": [],
        "query_start_loc": [0],
        "seq_lens": [],
        "token_rows": [],
        "req_rows": [],
    }
    (kept,) = running.views(np.array([0]), np.array([0]), np.array([3]), keep_rows=True)
    assert (kept.kv_indices.tolist(), kept.seq_lens.tolist()) == ([-1, -1, -1], [1])


def test_the_step_is_not_written_to() -> None:
    running = RunningEvictions(2, 2)
    running.set(0, Running((1, 2, 0)).eviction(2))
    arrays = np.array([0, 1]), np.array([1, 5]), np.array([2, 1])
    before = [array.tolist() for array in arrays]
    first = [as_lists(view) for view in running.views(*arrays)]
    assert [array.tolist() for array in arrays] == before
    assert [as_lists(view) for view in running.views(*arrays)] == first


@pytest.mark.parametrize("cleared_with", [None, Running((0, 1, 0))])
def test_a_slot_forgets_its_last_request(cleared_with: Running | None) -> None:
    running = RunningEvictions(2, 1)
    running.set(0, Running((1,) * 30 + (0,)).eviction(1))
    running.set(0, None if cleared_with is None else cleared_with.eviction(1))

    (view,) = running.views(np.array([0]), np.array([2]), np.array([3]))

    num_gone = 0 if cleared_with is None else 1
    assert running.any_in(np.array([0])) == bool(num_gone)
    assert not running.any_in(np.array([1]))
    assert view.kv_indices.tolist() == [2 - num_gone, 3 - num_gone, 4 - num_gone]


def test_slots_hold_on_to_nothing() -> None:
    running = RunningEvictions(4, 1)
    eviction = Running((1,) * 20_000 + (0,)).eviction(1)
    assert eviction is not None
    tracemalloc.start()
    try:
        for turn in range(200):
            copy = PromptEviction(tuple(tokens.copy() for tokens in eviction.evicted))
            running.set(turn % 4, copy)
            running.views(np.array([turn % 4]), np.array([19_000]), np.array([2]))
            running.set(turn % 4, None)
        del copy
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 100_000, "one eviction alone takes 160 kB"
