# SPDX-License-Identifier: Apache-2.0
"""Heat maps: the way to the workers and back, the rows of a step, cells of a view, and regions."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_crop.heat.request import MAX_CELLS, NOWHERE, RING, NoHeatError, extra_args, read, token_ids
from vllm_crop.heat.step import HeatRequest, heat_step
from vllm_crop.heat.taps import _map, _may_leave, attention_sums
from vllm_crop.localizers.heat import HeatGrid, HeatMap, heat_grid
from vllm_crop.planning.geometry import Box, GridPart, Region, TokenGrid, TokenGrids
from vllm_crop.planning.plan import make_plan


def asked(cells: list[int], num_cells: int, prompt: int = 20, start: int = 3) -> HeatRequest:
    sampling = SimpleNamespace(extra_args=extra_args(cells, num_cells))
    found = HeatRequest.of(sampling, prompt, [np.arange(start, start + len(cells))])
    assert found is not None
    return found


def logprobs(probabilities: Any) -> dict[int, Any]:
    """As vLLM returns them."""
    return {
        index: SimpleNamespace(logprob=math.log(value) if value > 0 else -math.inf)
        for index, value in enumerate(np.asarray(probabilities, dtype=np.float64).tolist())
    }


@given(st.integers(1, 5), st.integers(1, MAX_CELLS), st.integers(0, 2**32 - 1))
def test_a_map_comes_back_as_it_was_made(layers: int, num_cells: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = random.integers(RING, num_cells, 40)
    cells[0] = 0
    sums = torch.from_numpy(random.random((layers, 40)).astype(np.float32)) + 1e-3
    rows = heat_step([asked(cells.tolist(), num_cells, 60)], np.array([0]), np.array([60]))
    assert rows is not None
    probabilities = _map(sums, rows.rows[0])
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-6)
    heat = read(logprobs(probabilities), num_cells)
    counted = sums.double().numpy()
    shares = (counted / counted[:, cells != NOWHERE].sum(-1, keepdims=True)).max(0)
    for cell in range(num_cells):
        of_cell = shares[cells == cell]
        assert heat[cell] == pytest.approx(of_cell.mean() if len(of_cell) else 0.0, rel=1e-4)


@given(st.integers(1, 5), st.integers(2, MAX_CELLS), st.integers(0, 2**32 - 1))
def test_with_weights_maps_are_multiplied(layers: int, num_cells: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = random.integers(RING, num_cells, 200)
    cells[:2] = 0, 1
    sums = torch.from_numpy(random.random((layers, 200)).astype(np.float32)) + 1e-3
    weights = random.uniform(-1, 2, layers).round(3).tolist()
    sampling = SimpleNamespace(extra_args=extra_args(cells.tolist(), num_cells, list(range(layers)), weights))
    request = HeatRequest.of(sampling, 300, [np.arange(200)])
    rows = heat_step([request], np.array([0]), np.array([300]))
    assert rows is not None
    heat = read(logprobs(_map(sums, rows.rows[0])), num_cells)
    product = (sums.double().numpy() ** np.array(weights)[:, None]).prod(0)
    product[cells < 0] = 0
    product /= product.sum()
    for cell in range(num_cells):
        of_cell = product[cells == cell]
        assert heat[cell] == pytest.approx(of_cell.mean() if len(of_cell) else 0.0, rel=1e-3)


def test_weights_of_a_map_without_cells_make_no_numbers_that_are_none() -> None:
    sampling = SimpleNamespace(extra_args=extra_args([RING, NOWHERE], 4, [0], [2.0]))
    rows = heat_step([HeatRequest.of(sampling, 9, [np.array([3, 4])])], np.array([0]), np.array([9]))
    assert rows is not None
    assert torch.isfinite(_map(torch.ones(1, 2), rows.rows[0])).all()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        logprobs([0.5, 0.25, 0.25]),
        logprobs([0.1, 0.1, 0.1, math.nan, 0.2]),
        logprobs([0, 0, 0, 0.5, 0.1]),
    ],
    ids=["nothing", "few", "no number", "not all"],
)
def test_an_ordinary_answer_is_no_map(answer: dict[int, Any]) -> None:
    with pytest.raises(NoHeatError):
        read(answer, 3)


def test_a_map_fits_into_what_a_request_may_name() -> None:
    from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

    assert len(token_ids(MAX_CELLS)) == MAX_LOGPROB_TOKEN_IDS


class TestStep:
    def test_rows_of_a_prompt_in_chunks(self) -> None:
        one, other = asked([0, 1], 2, prompt=10), asked([0, 1], 2, prompt=6)
        step = heat_step([None, one, other], np.array([7, 0, 4]), np.array([1, 4, 2]))
        assert step is not None
        assert [(r.first, r.num_rows, r.is_last, r.batch_row) for r in step.rows] == [
            (0, 4, False, 1),
            (4, 2, True, 2),
        ]
        assert step.starts == ((1, 5),)

    def test_rows_move_up_where_others_are_evicted(self) -> None:
        step = heat_step(
            [None, asked([0, 1], 2, prompt=3)],
            np.array([0, 0]),
            np.array([5, 3]),
            [None, np.array([0, 4, 5, 6, 7])],
        )
        assert step is not None
        assert step.starts == ((5,), (5,), (2,))

    def test_a_step_can_end_early_if_nobody_needs_its_other_layers(self) -> None:
        one, stays = asked([0, 1], 2, prompt=3), asked([0, 1], 2, prompt=3)
        one.leaves = True

        def all_leave(requests: list[HeatRequest | None], computed: list[int]) -> bool:
            step = heat_step(requests, np.array(computed), np.array([1] * len(requests)))
            assert step is not None
            return step.all_leave

        assert all_leave([one], [0])
        assert all_leave([one, one], [2, 0])
        assert not all_leave([one, stays], [0, 0])
        assert not all_leave([one, None], [0, 0])
        assert not all_leave([one, one], [0, 3])  # the second one answers already

    @pytest.mark.parametrize(
        ("max_tokens", "said", "leaves"), [(1, True, True), (2, True, False), (1, 1, False)]
    )
    def test_only_a_request_of_one_token_leaves(self, max_tokens: int, said: Any, leaves: bool) -> None:
        extra = {"crop_heat": {"cells": [0, 1], "num_cells": 2, "leaves": said}}
        sampling = SimpleNamespace(extra_args=extra, max_tokens=max_tokens)
        read = HeatRequest.of(sampling, 5, [np.array([1, 2])])
        assert read is not None
        assert read.leaves is leaves

    def test_a_request_may_name_its_layers(self) -> None:
        def of(layers: Any) -> HeatRequest | None:
            sampling = SimpleNamespace(extra_args=extra_args([0, 1], 2, layers))
            return HeatRequest.of(sampling, 9, [np.array([3, 4])])

        named, every = of([7, 2, 7]), of(None)
        assert named is not None
        assert every is not None
        assert [layer for layer in range(9) if named.reads(layer)] == [2, 7]
        assert all(every.reads(layer) for layer in range(9))
        for wrong in ([], ["2"], [None]):
            assert of(wrong) is None

    @pytest.mark.parametrize(
        ("layers", "weights", "is_map"),
        [
            ([2, 7], [0.5, -1], True),
            ([2, 7], [0.5], False),
            ([7, 2], [0.5, 1.0], False),
            (None, [0.5], False),
            ([2, 7], [0.5, math.nan], False),
            ([2, 7], [0.5, 1e9], False),
            ([2, 7], [0.5, "1"], False),
        ],
        ids=str,
    )
    def test_each_named_layer_may_have_a_weight(self, layers: Any, weights: Any, is_map: bool) -> None:
        sampling = SimpleNamespace(extra_args=extra_args([0, 1], 2, layers, weights))
        found = HeatRequest.of(sampling, 9, [np.array([3, 4])])
        assert (found is not None) == is_map
        if found is not None:
            assert found.weights == (0.5, -1.0)

    def test_nothing_to_look_at(self) -> None:
        assert heat_step([None, None], np.array([0, 0]), np.array([5, 3])) is None
        decoding = asked([0, 1], 2, prompt=3)
        assert heat_step([decoding], np.array([3]), np.array([1])) is None


def test_attention_is_softmax_over_all_that_came_before() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(4, 8), torch.randn(11, 2, 8)
    wanted = torch.zeros(11)
    for head in range(4):
        wanted += torch.softmax(keys[:, head // 2] @ query[head] * 0.3, 0)
    assert torch.allclose(attention_sums(query, keys, 0.3), wanted, atol=1e-6)


class TestCells:
    def test_a_small_view_has_a_cell_for_each_token(self) -> None:
        grid = heat_grid(TokenGrid(6, 9))
        assert (grid.rows, grid.cols, grid.cells) == (6, 9, tuple(range(54)))

    def test_of_a_large_view_the_ring_counts_for_nothing(self) -> None:
        grid = heat_grid(TokenGrid(16, 20))
        assert grid.num_cells <= MAX_CELLS
        cells = np.array(grid.cells).reshape(16, 20)
        assert (cells[0] == RING).all()
        assert (cells[:, -1] == RING).all()
        assert (cells[1:-1, 1:-1] >= 0).all()

    def test_newlines_are_nowhere_and_tiles_lie_in_the_image(self) -> None:
        base = GridPart(TokenGrid(2, 2))
        tiles = GridPart(TokenGrid(4, 4), first=4, newlines=True)
        grid = heat_grid(TokenGrids((base, tiles)))
        assert (grid.rows, grid.cols) == (4, 4)
        assert grid.cells[:4] == (5, 7, 13, 15)
        assert grid.cells[4:9] == (0, 1, 2, 3, NOWHERE)

    def test_pooled_tokens_are_where_their_middle_is(self) -> None:
        tokens = TokenGrid(8, 8)
        plan = make_plan(tokens, Region.whole(), 0.75, "pool")
        grid = heat_grid(tokens, plan.assignment)
        assert len(grid.cells) == plan.num_embeddings
        for cell, members in zip(grid.cells, plan.members(), strict=True):
            row, col = np.mean([divmod(token, 8) for token in members], axis=0) + 0.5
            assert (cell // 4, cell % 4) == (int(row / 2), int(col / 2))
        assert sorted(set(grid.cells)) == list(range(16))

    @pytest.mark.parametrize(("rows", "cols"), [(4, 12), (12, 4), (8, 8)])
    def test_where_the_whole_images_tile_is_seen_alone_it_is_the_map(self, rows: int, cols: int) -> None:
        """Whatever the shape of the picture: no cell is empty."""
        tokens = TokenGrids((GridPart(TokenGrid(4, 4)), GridPart(TokenGrid(rows, cols), first=16)))
        assignment = np.full(tokens.num_tokens, -1, np.int32)
        assignment[:16] = np.arange(16)
        grid = heat_grid(tokens, assignment)
        assert (grid.rows, grid.cols) == (4, 4)
        assert grid.cells[:16] == tuple(range(16))

    def test_of_many_pooled_tokens_the_ring_counts_for_nothing(self) -> None:
        tokens = TokenGrid(48, 48)
        plan = make_plan(tokens, Region.whole(), 0.875, "pool")
        cells = np.array(heat_grid(tokens, plan.assignment).cells)
        assert 0.15 < (cells == RING).mean() < 0.35

    @given(st.integers(1, 200), st.integers(1, 200))
    def test_any_view_has_a_map(self, rows: int, cols: int) -> None:
        grid = heat_grid(TokenGrid(rows, cols))
        assert 1 <= grid.num_cells <= MAX_CELLS
        assert any(cell >= 0 for cell in grid.cells)


class TestRegion:
    def test_the_hottest_place_and_a_second_one_that_is_worth_it(self) -> None:
        values = np.full(64, 0.1)
        values[8 * 1 + 2], values[8 * 6 + 6] = 5.0, 3.0
        heat = HeatMap.of(HeatGrid(8, 8, tuple(range(64))), values)
        (one,) = heat.region(0.25, 1, 0.5).boxes
        assert one == Box(0.1875, 0.0625, 0.4375, 0.3125)
        assert len(heat.region(0.25, 2, 0.5).boxes) == 2
        assert len(heat.region(0.25, 2, 0.7).boxes) == 1

    def test_a_flat_map_is_no_confidence_and_a_hot_one_is(self) -> None:
        grid = HeatGrid(8, 8, tuple(range(64)))
        flat, hot = np.ones(64), np.zeros(64)
        hot[9] = 1
        for values, wanted in ((flat, 0.0), (hot, 1.0)):
            heat = HeatMap.of(grid, values)
            assert heat.within(heat.region(0.25, 1, 0.5)) == pytest.approx(wanted, abs=1e-9)
        with pytest.raises(NoHeatError):
            HeatMap.of(grid, np.zeros(64))

    @given(st.integers(1, 11), st.integers(1, 11), st.floats(0.05, 1), st.integers(1, 8), st.integers(0, 99))
    def test_any_map_has_a_region(self, rows: int, cols: int, side: float, most: int, seed: int) -> None:
        values = np.random.default_rng(seed).random(rows * cols)
        heat = HeatMap.of(HeatGrid(rows, cols, tuple(range(rows * cols))), values)
        region = heat.region(side, most, 0.5)
        assert 1 <= len(region.boxes) <= most
        assert all(
            0 <= box.x0 < box.x1 <= 1 + 1e-9 and 0 <= box.y0 < box.y1 <= 1 + 1e-9 for box in region.boxes
        )
        assert 0 <= heat.within(region) <= 1


class TestShape:
    def test_a_flat_map_is_spread_over_all_of_the_image(self) -> None:
        flat = HeatMap(np.full((4, 5), 1 / 20))
        assert flat.peak == pytest.approx(1 / 20)
        assert flat.spread == pytest.approx(1)
        assert flat.warm(Region.from_grid_cells(0, 0, 1, 1), 1.5) is None

    def test_a_map_of_one_cell_is_not_spread(self) -> None:
        values = np.zeros((3, 3))
        values[1, 2] = 1.0
        assert HeatMap(values).peak == 1.0
        assert HeatMap(values).spread == 0.0
        assert HeatMap(np.ones((1, 1))).spread == 0.0

    def test_warm_cells_outside_the_region_are_boxes(self) -> None:
        values = np.full((4, 4), 0.01)
        values[0, 0], values[3, 1:3], values[2, 3] = 0.5, 0.1, 0.1
        heat = HeatMap(values / values.sum())
        warm = heat.warm(Region((Box(0, 0, 0.25, 0.25),)), 1.0)
        assert warm is not None
        assert warm.as_lists() == [[0.75, 0.5, 1.0, 0.75], [0.25, 0.75, 0.75, 1.0]]


@pytest.mark.parametrize(
    ("changed", "may"),
    [
        ({}, True),
        ({"kv_transfer_config": object()}, False),
        ({"offload_config.offload_backend": "prefetch"}, False),
        ({"offload_config.prefetch.offload_group_size": 2}, False),
        ({"offload_config.uva.cpu_offload_gb": 1.0}, False),
        ({"parallel_config.data_parallel_size": 2}, True),
        ({"parallel_config.data_parallel_size": 2, "model_config.is_moe": True}, False),
    ],
    ids=str,
)
def test_a_step_ends_early_where_nobody_waits_for_later_layers(changed: dict[str, Any], may: bool) -> None:
    config = SimpleNamespace(
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(data_parallel_size=1),
        model_config=SimpleNamespace(is_moe=False),
        offload_config=SimpleNamespace(
            offload_backend="auto",
            prefetch=SimpleNamespace(offload_group_size=0),
            uva=SimpleNamespace(cpu_offload_gb=0),
        ),
    )
    for path, value in changed.items():
        *owners, name = path.split(".")
        owner = config
        for one in owners:
            owner = getattr(owner, one)
        setattr(owner, name, value)
    assert _may_leave(config) is may
