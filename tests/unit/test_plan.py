# SPDX-License-Identifier: Apache-2.0
"""Token plans: counts, coverage, evenness and budget arithmetic."""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import eviction_settings, grids, regions

from tests.slow_plan import PlannedEmbedding, embeddings_of, plan_of, tokens_in
from vllm_crop.planning.budget import BudgetError, Method, retained_count, retained_per_stage
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.plan import (
    Compression,
    TokenPlan,
    make_plan,
    whole_image_plan,
)

LLAVA = TokenGrid(24, 24)
rates = st.one_of(st.floats(0, 0.999), st.integers(0, 99).map(lambda hundredths: hundredths / 100))
compressions: st.SearchStrategy[Compression] = st.sampled_from(["pool", "prune"])
evicting: st.SearchStrategy[Method] = st.sampled_from(["ilp", "plc+ilp"])


@given(grids(), regions(), rates, compressions)
def test_every_plan_is_well_formed(
    grid: TokenGrid, region: Region, pruning_rate: float, compression: Compression
) -> None:
    plan = make_plan(grid, region, pruning_rate, compression)

    assert (plan.grid, plan.pruning_rate) == (grid, pruning_rate)
    assert plan.num_embeddings == retained_count(grid.num_tokens, pruning_rate)
    used = [token for embedding in embeddings_of(plan) for token in embedding.tokens]
    assert len(used) == len(set(used)), "a token belongs to two embeddings"
    assert set(used) <= set(range(grid.num_tokens))
    for embedding in embeddings_of(plan):
        assert embedding.tokens == tuple(sorted(embedding.tokens))
        assert embedding.position in embedding.tokens
        assert embedding.evicted_from_layer is None
    positions = [embedding.position for embedding in embeddings_of(plan)]
    assert all(before < after for before, after in itertools.pairwise(positions))


@given(grids(), regions(), rates, compressions)
def test_a_region_within_the_budget_is_kept_token_by_token(
    grid: TokenGrid, region: Region, pruning_rate: float, compression: Compression
) -> None:
    inside = tokens_in(grid, region)
    assume(len(inside) <= retained_count(grid.num_tokens, pruning_rate))
    kept = {e.tokens: e.position for e in embeddings_of(make_plan(grid, region, pruning_rate, compression))}
    assert all(kept.get((token,)) == token for token in inside)


@given(grids(), regions(), rates, compressions)
def test_a_region_beyond_the_budget_takes_all_of_it(
    grid: TokenGrid, region: Region, pruning_rate: float, compression: Compression
) -> None:
    inside = tokens_in(grid, region)
    assume(len(inside) >= retained_count(grid.num_tokens, pruning_rate))
    plan = make_plan(grid, region, pruning_rate, compression)
    assert all(len(embedding.tokens) == 1 for embedding in embeddings_of(plan))
    assert {embedding.position for embedding in embeddings_of(plan)} <= set(inside)


@given(grids(), regions(), rates)
def test_pooling_spreads_the_whole_context_over_patches_of_similar_size(
    grid: TokenGrid, region: Region, pruning_rate: float
) -> None:
    inside = set(tokens_in(grid, region))
    share = retained_count(grid.num_tokens, pruning_rate) - len(inside)
    assume(share > 0)
    plan = make_plan(grid, region, pruning_rate, "pool")
    patches = [e.tokens for e in embeddings_of(plan) if not inside.intersection(e.tokens)]

    assert {token for e in embeddings_of(plan) for token in e.tokens} == set(range(grid.num_tokens))
    assert len(patches) == share
    average = (grid.num_tokens - len(inside)) / share
    assert all(average / 3 <= len(patch) <= 2 * average for patch in patches)


@given(grids(), regions(), rates)
def test_a_pooled_embedding_sits_at_the_token_nearest_to_its_centroid(
    grid: TokenGrid, region: Region, pruning_rate: float
) -> None:
    for embedding in embeddings_of(make_plan(grid, region, pruning_rate, "pool")):
        places = {token: divmod(token, grid.cols) for token in embedding.tokens}
        centroid = [sum(axis) / len(places) for axis in zip(*places.values(), strict=True)]
        distances = {token: math.dist(place, centroid) for token, place in places.items()}
        assert distances[embedding.position] == pytest.approx(min(distances.values()))


@given(grids(), regions(), rates)
def test_pruning_keeps_the_token_at_which_pooling_would_put_the_mean(
    grid: TokenGrid, region: Region, pruning_rate: float
) -> None:
    pooled = make_plan(grid, region, pruning_rate, "pool")
    pruned = make_plan(grid, region, pruning_rate, "prune")
    positions = [embedding.position for embedding in embeddings_of(pooled)]
    assert [(e.tokens, e.position) for e in embeddings_of(pruned)] == [((p,), p) for p in positions]


@given(grids(), regions(), compressions)
def test_pruning_rate_zero_leaves_the_image_as_it_is(
    grid: TokenGrid, region: Region, compression: Compression
) -> None:
    plan = make_plan(grid, region, 0.0, compression)
    assert plan == whole_image_plan(grid)
    assert [(e.tokens, e.position) for e in embeddings_of(plan)] == [
        ((t,), t) for t in range(grid.num_tokens)
    ]


@pytest.mark.parametrize(
    ("cells", "budgets"),
    [
        ((0, 0, 7, 7), (1, 2, 3, 4, 16, 64, 100, 128, 191, 192, 288, 323, 400, 575)),
        ((2, 1, 7, 6), (1, 3, 4, 32, 64, 128, 192, 288, 323)),
        ((0, 2, 7, 5), (1, 3, 4, 32, 64, 128, 192, 287)),
    ],
)
def test_a_region_beyond_the_budget_is_sampled_alike_in_every_quadrant(
    cells: tuple[int, int, int, int], budgets: tuple[int, ...]
) -> None:
    region = Region.from_grid_cells(*cells)
    row0, row1, col0, col1 = LLAVA.span(region.boxes[0])
    for budget in budgets:
        plan = make_plan(LLAVA, region, 1 - budget / 576, "pool")
        places = [divmod(embedding.position, 24) for embedding in embeddings_of(plan)]
        shares = Counter((2 * row >= row0 + row1, 2 * col >= col0 + col1) for row, col in places)
        assert shares.total() == budget
        for quadrant in itertools.product((False, True), (False, True)):
            assert abs(shares[quadrant] - budget / 4) < 2


@pytest.mark.parametrize(("budget", "reach"), [(16, 3), (36, 3), (64, 1), (128, 1), (192, 1), (400, 1)])
def test_no_token_of_a_sampled_image_is_far_from_a_kept_one(budget: int, reach: int) -> None:
    plan = make_plan(LLAVA, Region.whole(), 1 - budget / 576, "prune")
    kept = [divmod(embedding.position, 24) for embedding in embeddings_of(plan)]
    for row, col in itertools.product(range(24), range(24)):
        assert min(max(abs(row - r), abs(col - c)) for r, c in kept) <= reach


def test_pooled_patches_of_llava_are_compact_and_within_half_of_their_average_size() -> None:
    spans = [(0, 1), (1, 2), (1, 4), (2, 4), (3, 3), (5, 7)]
    sprawling = total = 0
    for (x0, x1), (y0, y1), pruning_rate in itertools.product(spans, spans, [0.667, 0.778, 0.889]):
        region = Region.from_grid_cells(x0, y0, x1, y1)
        plan = make_plan(LLAVA, region, pruning_rate, "pool")
        inside = set(tokens_in(LLAVA, region))
        patches = [e.tokens for e in embeddings_of(plan) if not inside.intersection(e.tokens)]
        average = sum(map(len, patches)) / max(1, len(patches))
        for patch in patches:
            rows, cols = [t // 24 for t in patch], [t % 24 for t in patch]
            area = (max(rows) - min(rows) + 1) * (max(cols) - min(cols) + 1)
            total += 1
            sprawling += len(patch) / area < 1 / 3
            assert average / 1.5 <= len(patch) <= 1.5 * average
    # The few that sprawl reach around the region, which is a hole in the context.
    assert sprawling <= 0.004 * total


@given(st.integers(1, 5000), rates)
@example(576, 0.999)
def test_retained_count_is_the_nearest_whole_number_and_at_least_one(
    num_tokens: int, pruning_rate: float
) -> None:
    count = retained_count(num_tokens, pruning_rate)
    assert 1 <= count <= num_tokens
    assert count == 1 or abs(num_tokens * (1 - pruning_rate) - count) <= 0.5


@given(st.integers(1, 5000), rates, rates)
def test_a_higher_pruning_rate_never_retains_more(num_tokens: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert retained_count(num_tokens, high) <= retained_count(num_tokens, low)


@pytest.mark.parametrize(("pruning_rate", "tokens"), [(0.667, 192), (0.778, 128), (0.889, 64)])
def test_llava_budgets_are_those_the_field_reports(pruning_rate: float, tokens: int) -> None:
    assert retained_count(576, pruning_rate) == tokens
    for region in (Region.whole(), Region.from_grid_cells(3, 3, 4, 4)):
        plan = make_plan(LLAVA, region, pruning_rate, "pool")
        assert plan.num_embeddings == tokens
        assert plan.pruning_rate_got(32) == pytest.approx(pruning_rate, abs=0.5 / 576)


@dataclass(frozen=True)
class Evicting:
    """A plan that may evict, and what it was made from."""

    plan: TokenPlan
    region: Region
    compression: Compression
    method: Method
    num_layers: int
    layers: tuple[int, ...]
    counts: tuple[int, ...]

    def stage(self, index: int) -> set[int]:
        """Positions of what is left after `index` evictions."""
        left = (None, *self.layers[index:])
        return {e.position for e in embeddings_of(self.plan) if e.evicted_from_layer in left}


@st.composite
def evicting_plans(draw: st.DrawFn) -> Evicting:
    grid, region, rate, compression = draw(grids()), draw(regions()), draw(rates), draw(compressions)
    method, (num_layers, layers) = draw(evicting), draw(eviction_settings())
    try:
        counts = retained_per_stage(grid.num_tokens, rate, method, num_layers, layers)
    except BudgetError:
        assume(False)
    plan = make_plan(grid, region, rate, compression, method, num_layers, layers)
    return Evicting(plan, region, compression, method, num_layers, layers, counts)


@given(evicting_plans())
def test_evicting_plans_are_well_formed_and_deliver_the_counts_of_the_budget(made: Evicting) -> None:
    plan = made.plan
    positions = [embedding.position for embedding in embeddings_of(plan)]
    assert positions == sorted(set(positions))
    assert {e.evicted_from_layer for e in embeddings_of(plan)} <= {None, *made.layers}
    assert tuple(len(made.stage(index)) for index in range(len(made.counts))) == made.counts
    bounds = [0, *made.layers, made.num_layers]
    assert plan.tokens_per_layer(made.num_layers) == [
        count
        for count, (start, end) in zip(made.counts, itertools.pairwise(bounds), strict=True)
        for _ in range(start, end)
    ]
    assert plan.evicts == (made.counts[-1] < made.counts[0])
    assert plan.compresses == (made.counts[0] < plan.grid.num_tokens)


@given(evicting_plans())
def test_no_stage_keeps_context_while_it_evicts_from_the_region(made: Evicting) -> None:
    inside = set(tokens_in(made.plan.grid, made.region))
    for before, after in itertools.pairwise(made.stage(index) for index in range(len(made.counts))):
        assert after <= before
        assert before & inside <= after or after <= inside


@given(evicting_plans())
def test_eviction_alone_passes_every_token_to_the_language_model(made: Evicting) -> None:
    assume(made.method == "ilp")
    tokens = range(made.plan.grid.num_tokens)
    assert [(e.tokens, e.position) for e in embeddings_of(made.plan)] == [((t,), t) for t in tokens]


@given(evicting_plans())
def test_what_is_compressed_before_eviction_is_compressed_as_without_it(made: Evicting) -> None:
    assume(made.method == "plc+ilp")
    grid, count = made.plan.grid, made.counts[0]
    alone = make_plan(grid, made.region, 1 - count / grid.num_tokens, made.compression)
    assert [(e.tokens, e.position) for e in embeddings_of(made.plan)] == [
        (e.tokens, e.position) for e in embeddings_of(alone)
    ]


def test_what_each_stage_keeps_of_the_context_lies_in_all_of_it() -> None:
    region = Region.from_grid_cells(3, 3, 4, 4)  # 36 tokens
    plan = make_plan(LLAVA, region, 0.778, "pool", "ilp", 32, (2,))
    kept = [divmod(e.position, 24) for e in embeddings_of(plan) if e.evicted_from_layer is None]
    assert len(kept) == 98
    for row, col in itertools.product(range(24), range(24)):
        assert min(max(abs(row - r), abs(col - c)) for r, c in kept) <= 4
    shares = Counter((row >= 12, col >= 12) for row, col in kept)
    assert all(abs(shares[quadrant] - 98 / 4) < 3 for quadrant in shares)


def test_a_region_beyond_the_budget_of_a_stage_is_sampled_alike_in_every_quadrant() -> None:
    plan = make_plan(LLAVA, Region.whole(), 8 / 9, "pool", "ilp", 32, (2, 16))
    for layers in ((None, 16), (None,)):
        kept = [divmod(e.position, 24) for e in embeddings_of(plan) if e.evicted_from_layer in layers]
        shares = Counter((row >= 12, col >= 12) for row, col in kept)
        assert len(shares) == 4
        assert all(abs(share - len(kept) / 4) < 2 for share in shares.values())


@pytest.mark.parametrize("method", ["ilp", "plc+ilp"])
def test_nothing_is_evicted_at_pruning_rate_zero(method: Method) -> None:
    plan = make_plan(LLAVA, Region.from_grid_cells(0, 0, 1, 1), 0.0, "pool", method, 32, (2, 16))
    assert plan == whole_image_plan(LLAVA)
    assert not plan.evicts
    assert not plan.compresses


def test_compression_alone_pays_no_attention_to_layers() -> None:
    region = Region.from_grid_cells(0, 0, 1, 1)
    plan = make_plan(LLAVA, region, 0.778, "pool", "plc", 32, ())
    assert plan == make_plan(LLAVA, region, 0.778, "pool")
    assert plan.compresses
    assert not plan.evicts


def test_a_budget_that_cannot_be_met_makes_no_plan() -> None:
    with pytest.raises(BudgetError, match="begin at layer 1 or earlier"):
        make_plan(LLAVA, Region.whole(), 0.95, "pool", "ilp", 32, (8,))


@st.composite
def plans_with_evictions(draw: st.DrawFn) -> TokenPlan:
    """A plan whose embeddings leave at layers drawn at random."""
    grid, region = draw(grids(6)), draw(regions())
    plan = make_plan(grid, region, draw(rates), "pool")
    embeddings = tuple(
        PlannedEmbedding(e.tokens, e.position, draw(st.none() | st.integers(0, 9)))
        for e in embeddings_of(plan)
    )
    return plan_of(grid, plan.pruning_rate, embeddings)


@given(plans_with_evictions(), st.integers(1, 12))
def test_layer_counts_and_the_rate_reached_agree_with_counting_pairs(
    plan: TokenPlan, num_layers: int
) -> None:
    run = [
        (layer, embedding)
        for layer in range(num_layers)
        for embedding in embeddings_of(plan)
        if embedding.evicted_from_layer is None or layer < embedding.evicted_from_layer
    ]
    per_layer = Counter(layer for layer, _ in run)
    assert plan.tokens_per_layer(num_layers) == [per_layer[layer] for layer in range(num_layers)]
    full = plan.grid.num_tokens * num_layers
    assert plan.pruning_rate_got(num_layers) == pytest.approx((full - len(run)) / full)


def test_an_embedding_is_absent_from_the_layer_that_evicts_it_on() -> None:
    embeddings = (PlannedEmbedding((0,), 0, 2), PlannedEmbedding((1,), 1))
    plan = plan_of(TokenGrid(2, 2), 0.5, embeddings)
    assert plan.tokens_per_layer(4) == [2, 2, 1, 1]
    assert plan.pruning_rate_got(4) == 1 - 6 / 16


@given(grids(), regions(), rates, compressions)
def test_assignment_names_the_embedding_of_each_token(
    grid: TokenGrid, region: Region, pruning_rate: float, compression: Compression
) -> None:
    plan = make_plan(grid, region, pruning_rate, compression)
    assignment = plan.assignment.tolist()
    assert len(assignment) == grid.num_tokens
    for token, index in enumerate(assignment):
        holders = [i for i, embedding in enumerate(embeddings_of(plan)) if token in embedding.tokens]
        assert holders == ([] if index == -1 else [index])


def test_json_of_a_plan_has_the_fields_scripts_rely_on() -> None:
    plan = make_plan(TokenGrid(2, 4), Region.from_grid_cells(0, 0, 1, 3), 0.5, "pool")
    printed = json.loads(json.dumps(plan.to_json(num_layers=3)))
    assert list(printed) == ["grid", "pruning_rate", "pruning_rate_got", "embeddings", "tokens_per_layer"]
    assert printed["grid"] == [2, 4]
    assert printed["pruning_rate"] == printed["pruning_rate_got"] == 0.5
    assert printed["tokens_per_layer"] == [4, 4, 4]
    assert printed["embeddings"][0] == {"tokens": [0], "position": 0, "evicted_from_layer": None}
    assert sorted(token for e in printed["embeddings"] for token in e["tokens"]) == list(range(8))


def test_json_rounds_the_rate_reached_and_keeps_evictions() -> None:
    plan = plan_of(TokenGrid(1, 3), 0.9, (PlannedEmbedding((0, 1), 0, 1),))
    printed = plan.to_json(num_layers=1)
    assert printed["pruning_rate_got"] == 0.666667
    assert printed["embeddings"] == [{"tokens": [0, 1], "position": 0, "evicted_from_layer": 1}]
