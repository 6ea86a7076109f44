# SPDX-License-Identifier: Apache-2.0
"""Plans of images whose tokens are several grids: counts, regions, newlines, shares."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import boxes, eviction_settings, exact, regions

from tests.slow_plan import embeddings_of, tokens_in
from vllm_crop.planning.budget import BudgetError, Method, retained_count, retained_per_stage
from vllm_crop.planning.geometry import Box, GridPart, Region, TokenGrid, TokenGrids
from vllm_crop.planning.plan import Compression, TokenPlan, make_plan, whole_image_plan
from vllm_crop.planning.summary import PlanSummary

WHOLE = GridPart(TokenGrid(24, 24))
TILES = GridPart(TokenGrid(36, 48), first=576, newlines=True)
NEXT = TokenGrids((WHOLE, TILES))  # LLaVA-NeXT's of 640 x 480 pixels
rates = st.integers(0, 99).map(lambda hundredths: hundredths / 100)
compressions: st.SearchStrategy[Compression] = st.sampled_from(["pool", "prune"])


@st.composite
def several_grids(draw: st.DrawFn) -> TokenGrids:
    parts: list[GridPart] = []
    for _ in range(draw(st.integers(1, 3))):
        first = parts[-1].first + parts[-1].num_tokens if parts else 0
        grid = TokenGrid(draw(st.integers(1, 10)), draw(st.integers(1, 10)))
        parts.append(GridPart(grid, draw(boxes(-10, 110)), first, draw(st.booleans())))
    return TokenGrids(tuple(parts))


def newlines(grid: TokenGrids) -> dict[int, tuple[int, ...]]:
    """The tokens of each newline's row, by the newline."""
    return {
        part.token(row, part.grid.cols): tuple(part.token(row, col) for col in range(part.grid.cols))
        for part in grid.parts
        if part.newlines
        for row in range(part.grid.rows)
    }


@given(several_grids())
def test_tokens_are_numbered_through_all_grids_row_by_row(grid: TokenGrids) -> None:
    places = [
        ((2 * index, row, col) if col < part.grid.cols else (2 * index + 1, row, 0))
        for index, part in enumerate(grid.parts)
        for row in range(part.grid.rows)
        for col in range(part.grid.cols + part.newlines)
    ]
    assert list(zip(*(axis.tolist() for axis in grid.places()), strict=True)) == places
    for index, part in enumerate(grid.parts):
        cells = [part.cell(token) for token in range(grid.num_tokens)]
        assert cells == [(row, col) if group == 2 * index else None for group, row, col in places]


@given(several_grids(), regions())
def test_a_region_has_the_tokens_it_touches_in_every_grid_and_their_newlines(
    grid: TokenGrids, region: Region
) -> None:
    found = set(grid.mask(region).nonzero()[0].tolist())
    for part in grid.parts:
        x0, y0, x1, y1 = map(exact, part.window.as_list())
        for row, col in itertools.product(range(part.grid.rows), range(part.grid.cols)):
            left, right = (x0 + (x1 - x0) * edge / part.grid.cols for edge in (col, col + 1))
            top, bottom = (y0 + (y1 - y0) * edge / part.grid.rows for edge in (row, row + 1))
            touched = any(
                exact(box.x0) < right
                and left < exact(box.x1)
                and exact(box.y0) < bottom
                and top < exact(box.y1)
                for box in region.boxes
            )
            assert touched == (part.token(row, col) in found), (part, row, col)
    for newline, row_tokens in newlines(grid).items():
        assert (newline in found) == (not found.isdisjoint(row_tokens))


@given(several_grids(), regions(), rates, compressions)
def test_plans_deliver_the_budget_and_average_within_a_group(
    grid: TokenGrids, region: Region, rate: float, compression: Compression
) -> None:
    inside = set(tokens_in(grid, region))
    assume(inside)
    plan = make_plan(grid, region, rate, compression)
    assert plan.num_embeddings == retained_count(grid.num_tokens, rate)
    used = [token for embedding in embeddings_of(plan) for token in embedding.tokens]
    assert len(used) == len(set(used))
    positions = [embedding.position for embedding in embeddings_of(plan)]
    assert positions == sorted(set(positions))
    group = grid.places().part.tolist()
    for embedding in embeddings_of(plan):
        assert embedding.position in embedding.tokens
        assert len({group[token] for token in embedding.tokens}) == 1
        assert len(embedding.tokens) == 1 or inside.isdisjoint(embedding.tokens)
    kept = {embedding.tokens[0] for embedding in embeddings_of(plan) if len(embedding.tokens) == 1}
    assert inside <= kept or kept <= inside


@given(several_grids(), regions(), rates)
def test_every_group_of_the_context_gets_its_share(grid: TokenGrids, region: Region, rate: float) -> None:
    inside = set(tokens_in(grid, region))
    left = retained_count(grid.num_tokens, rate) - len(inside)
    assume(inside and left > 0)
    context = [token for token in range(grid.num_tokens) if token not in inside]
    group = grid.places().part.tolist()
    sizes = Counter(group[token] for token in context)
    plan = make_plan(grid, region, rate, "prune")
    got = Counter(group[e.position] for e in embeddings_of(plan) if e.position not in inside)
    assert all(abs(got[group] - left * size / len(context)) < 1 for group, size in sizes.items())


@given(several_grids(), regions(), rates, st.sampled_from(["ilp", "plc+ilp"]), eviction_settings(12, 3))
def test_eviction_delivers_the_counts_of_every_stage(
    grid: TokenGrids, region: Region, rate: float, method: Method, depth: tuple[int, tuple[int, ...]]
) -> None:
    assume(tokens_in(grid, region))
    num_layers, layers = depth
    try:
        counts = retained_per_stage(grid.num_tokens, rate, method, num_layers, layers)
    except BudgetError:
        assume(False)
    plan = make_plan(grid, region, rate, "pool", method, num_layers, layers)
    assert [plan.tokens_per_layer(num_layers)[layer] for layer in (0, *layers)] == list(counts)


def test_newlines_stay_with_the_rows_of_the_region_and_are_averaged_with_newlines() -> None:
    plan = make_plan(NEXT, Region((Box(0.25, 0.25, 0.5, 0.5),)), 0.889, "pool")
    ends = newlines(NEXT)
    by_token = {token: e.tokens for e in embeddings_of(plan) for token in e.tokens}
    assert plan.num_embeddings == retained_count(2340, 0.889) == 260
    assert [newline for newline in ends if by_token[newline] == (newline,)] == list(ends)[9:18]
    assert all(set(by_token[newline]) <= set(ends) for newline in ends)


def test_a_region_is_kept_in_both_grids() -> None:
    region = Region((Box(0.25, 0.25, 0.5, 0.5),))
    assert NEXT.mask(region).sum() == 6 * 6 + 9 * (12 + 1)
    plan = make_plan(NEXT, region, 0.889, "pool")
    summary = PlanSummary.of(plan, region, 32)
    assert (summary.tokens, summary.region_tokens, summary.region_kept) == (2340, 153, 153)


def test_an_image_left_whole_keeps_every_token() -> None:
    whole = whole_image_plan(NEXT)
    assert whole.assignment.tolist() == list(range(2340))
    assert make_plan(NEXT, Region.whole(), 0.0, "pool") == whole


def test_json_of_a_plan_describes_every_grid() -> None:
    plan: TokenPlan = make_plan(NEXT, Region.whole(), 0.5, "prune")
    printed = json.loads(json.dumps(plan.to_json(num_layers=2)))
    assert list(printed) == ["grids", "pruning_rate", "pruning_rate_got", "embeddings", "tokens_per_layer"]
    assert printed["grids"] == [
        {"grid": [24, 24], "window": [0, 0, 1, 1], "newlines": False},
        {"grid": [36, 48], "window": [0, 0, 1, 1], "newlines": True},
    ]
    assert NEXT.describe() == "24 x 24 and 36 x 48 with newlines"
    tiles = TokenGrids(tuple(GridPart(TokenGrid(4, 4), first=16 * index) for index in range(13)))
    assert tiles.describe() == "13 times 4 x 4"


def test_grids_that_do_not_follow_each_other_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="begins at token 575, the one before it ends at 576"):
        TokenGrids((WHOLE, GridPart(TokenGrid(1, 1), first=575)))


def test_a_grid_without_columns_is_newlines_of_no_region() -> None:
    thin = TokenGrids((WHOLE, GridPart(TokenGrid(72, 0), first=576, newlines=True)))
    assert thin.num_tokens == 576 + 72
    assert thin.mask(Region.whole()).nonzero()[0].tolist() == list(range(576))
    assert make_plan(thin, Region.whole(), 0.05, "pool").num_embeddings == 616
