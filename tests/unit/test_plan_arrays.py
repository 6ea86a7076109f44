# SPDX-License-Identifier: Apache-2.0
"""Plans over arrays against the same written out, how long they take, and how much of them is kept."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import boxes, eviction_settings, regions

from tests.slow_plan import embeddings_of, place_of, slow_plan, tokens_in
from tests.slow_plan import even_groups as slowly_split
from tests.slow_plan import retained_per_stage as all_bisections
from vllm_crop.families.llava_next import LLAVA_NEXT, LLAVA_ONEVISION, AnyResolution
from vllm_crop.planning import plan as planning
from vllm_crop.planning.budget import BudgetError, Method, retained_per_stage
from vllm_crop.planning.geometry import Box, GridPart, ImageTokens, Region, TokenGrid, TokenGrids
from vllm_crop.planning.groups import even_groups
from vllm_crop.planning.plan import CACHE_BYTES, Compression, make_plan, whole_image_plan

NEXT = AnyResolution.from_settings({}, LLAVA_NEXT, 336, 24, None).tokens(672, 672)
MIDDLE = Region((Box(0.375, 0.375, 0.625, 0.625),))
AWKWARD = {
    "tiny": Region((Box(0.301, 0.301, 0.302, 0.302),)),
    "several": Region((Box(0.1, 0.1, 0.2, 0.35), Box(0.5, 0.6, 0.9, 0.7), Box(0.7, 0.1, 0.8, 0.8))),
    "nearly whole": Region((Box(0, 0, 1, 0.97),)),
    "middle": MIDDLE,
}
METHODS: dict[str, tuple[Compression, Method, tuple[int, ...]]] = {
    "pool": ("pool", "plc", ()),
    "prune": ("prune", "plc", ()),
    "ilp": ("pool", "ilp", (2,)),
    "plc+ilp": ("pool", "plc+ilp", (2,)),
    "plc+ilp, two": ("prune", "plc+ilp", (2, 16)),
    "ilp, four": ("pool", "ilp", (2, 8, 16, 24)),
}
# Both ways of splitting are compared with the same plans, of which the largest take a second.
known_plan = cache(slow_plan)
rates = st.one_of(st.floats(0, 0.999), st.sampled_from([0.5, 0.667, 0.778, 0.889, 0.95]))


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def split_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """How tokens are split; plans that were made otherwise are forgotten."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(planning, "_compiled", None)
        if request.param == "compiled":
            pytest.importorskip("numba")
            assert planning.use_compiled()
        planning._plan_counts.cache.clear()
        yield request.param


@st.composite
def any_tokens(draw: st.DrawFn) -> ImageTokens:
    """One grid, thin ones among them, or several with newlines and windows."""
    side = st.integers(1, 28)
    if draw(st.booleans()):
        rows, cols = draw(st.one_of(st.tuples(side, side), st.tuples(st.just(1), st.integers(1, 200))))
        return TokenGrid(cols, rows) if draw(st.booleans()) else TokenGrid(rows, cols)
    parts: list[GridPart] = []
    for _ in range(draw(st.integers(1, 3))):
        first = parts[-1].first + parts[-1].num_tokens if parts else 0
        grid = TokenGrid(draw(side), draw(side))
        parts.append(GridPart(grid, draw(boxes(-10, 110)), first, draw(st.booleans())))
    return TokenGrids(tuple(parts))


@pytest.mark.usefixtures("split_by")
@given(
    any_tokens(),
    regions(),
    rates,
    st.sampled_from(["pool", "prune"]),
    st.sampled_from(["plc", "ilp", "plc+ilp"]),
    eviction_settings(),
    st.sampled_from([None, 0.02, 0.125, 0.5]),
)
def test_plans_are_those_of_the_slow_reference(
    grid: ImageTokens,
    region: Region,
    rate: float,
    compression: Compression,
    method: Method,
    depth: tuple[int, tuple[int, ...]],
    rim: float | None,
) -> None:
    num_layers, layers = depth
    around = rim and region.widened(rim)
    arguments = (grid, region, rate, compression, method, num_layers, layers, around or None)
    try:
        plan = make_plan(*arguments)
    except BudgetError:
        assume(False)
    assert embeddings_of(plan) == slow_plan(*arguments)


@pytest.mark.usefixtures("split_by")
@given(any_tokens(), st.data())
def test_any_tokens_are_split_as_by_the_slow_reference(grid: ImageTokens, data: st.DataObject) -> None:
    chance = data.draw(st.randoms(use_true_random=False))
    tokens = sorted(chance.sample(range(grid.num_tokens), data.draw(st.integers(1, grid.num_tokens))))
    count = data.draw(st.integers(0, len(tokens)))
    split, sizes = even_groups(grid.places(), np.array(tokens), count)
    found = np.split(split, sizes.cumsum()[:-1]) if count else []
    assert sorted(sorted(patch.tolist()) for patch in found) == sorted(
        sorted(patch) for patch in slowly_split(grid, tokens, count)
    )


@pytest.mark.usefixtures("split_by")
def test_of_equal_shares_the_group_wins_that_comes_first_in_the_prompt() -> None:
    """A newline of one row before what another row shows."""
    grid = TokenGrids((GridPart(TokenGrid(2, 1), newlines=True),))
    assert even_groups(grid.places(), np.array([1, 2]), 1).tokens.tolist() == [1]
    assert slowly_split(grid, [1, 2], 1) == [[1]]


@pytest.mark.usefixtures("split_by")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "grid",
    [TokenGrid(24, 24), TokenGrid(64, 64), TokenGrid(128, 128), NEXT],
    ids=["24x24", "64x64", "128x128", "LLaVA-NeXT 672x672"],
)
def test_plans_of_published_sizes_are_those_of_the_slow_reference(grid: ImageTokens, method: str) -> None:
    compression, name, layers = METHODS[method]
    for index, (region, rate) in enumerate(zip(AWKWARD.values(), (0.889, 0.5, 0.667, 0.778), strict=True)):
        if grid.num_tokens > 10_000 and index % 2:
            continue  # the reference takes a while
        around = region.widened(0.125) if index == 1 or method == "pool" else None
        arguments = (grid, region, rate, compression, name, 32, layers, around)
        assert embeddings_of(make_plan(*arguments)) == known_plan(*arguments)


@pytest.mark.usefixtures("split_by")
def test_plans_of_many_tiles_are_those_of_the_slow_reference() -> None:
    grid = AnyResolution.from_settings({}, LLAVA_ONEVISION, 384, 27, None).tokens(2304, 2304)
    assert grid.num_tokens > 7000
    for region, method in itertools.product((AWKWARD["several"], MIDDLE), ("pool", "plc+ilp, two")):
        compression, name, layers = METHODS[method]
        plan = make_plan(grid, region, 0.778, compression, name, 28, layers)
        assert embeddings_of(plan) == known_plan(grid, region, 0.778, compression, name, 28, layers)


@given(any_tokens(), regions())
def test_masks_and_places_are_those_of_the_slow_reference(grid: ImageTokens, region: Region) -> None:
    assert tuple(grid.mask(region).nonzero()[0].tolist()) == tokens_in(grid, region)
    places = zip(*(axis.tolist() for axis in grid.places()), strict=True)
    assert list(places) == [place_of(grid, token) for token in range(grid.num_tokens)]


@given(st.integers(1, 20_000), rates, st.sampled_from(["ilp", "plc+ilp"]), eviction_settings())
def test_stages_are_those_of_all_bisections(
    num_tokens: int, rate: float, method: Method, depth: tuple[int, tuple[int, ...]]
) -> None:
    try:
        counts = retained_per_stage(num_tokens, rate, method, *depth)
    except BudgetError:
        assume(False)
    assert counts == all_bisections(num_tokens, rate, method, *depth)


def test_the_arrays_of_a_plan_cannot_be_written_to() -> None:
    for plan in (make_plan(NEXT, MIDDLE, 0.5, "pool"), whole_image_plan(NEXT)):
        for array in (plan.assignment, plan.position, plan.evicted_from_layer):
            assert array.dtype == np.int32
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_equal_plans_hash_alike_and_others_are_not_equal() -> None:
    grid = TokenGrid(4, 4)
    plan = make_plan(grid, MIDDLE, 0.5, "pool", "plc+ilp", 8, (2,))
    planning._plan_counts.cache.clear()
    again = make_plan(grid, MIDDLE, 0.5, "pool", "plc+ilp", 8, (2,))
    assert plan is not again
    assert plan == again
    assert hash(plan) == hash(again)
    others = [
        make_plan(grid, MIDDLE, 0.5, "pool", "plc+ilp", 8, (3,)),
        make_plan(grid, MIDDLE, 0.5, "prune", "plc+ilp", 8, (2,)),
        make_plan(TokenGrid(2, 8), MIDDLE, 0.5, "pool", "plc+ilp", 8, (2,)),
    ]
    assert all(plan != other for other in (*others, "a plan"))


def test_plans_kept_stay_within_their_bytes() -> None:
    """Clients choose regions: neither many plans nor many boxes take more."""
    cache = planning._plan_counts.cache
    grid = TokenGrid(128, 128)
    for step in range(60):
        side = (step + 1) / 128
        region = Region(tuple(Box(0, 0, side, side) for _ in range(50)))
        plan = make_plan(grid, region, 0.3, "prune")
        assert make_plan(grid, region, 0.3, "prune") is plan
        assert CACHE_BYTES >= cache.currsize >= sum(kept.assignment.nbytes for kept in cache.values())
    assert len(cache) < 60, "nothing was forgotten"
    small = [make_plan(TokenGrid(8, 8), MIDDLE, step / 1000, "pool") for step in range(900)]
    assert make_plan(TokenGrid(8, 8), MIDDLE, 0.899, "pool") is small[-1]
    assert cache.currsize <= CACHE_BYTES


@given(st.data(), regions(), rates, st.sampled_from(sorted(METHODS)))
def test_what_is_left_out_has_no_embedding(
    data: st.DataObject, region: Region, rate: float, method: str
) -> None:
    """Compiled as by numpy."""
    grid: ImageTokens = data.draw(st.sampled_from([TokenGrid(9, 7), TokenGrid(1, 30), NEXT]))
    seed, share = data.draw(st.integers(0, 999)), data.draw(st.floats(0, 1))
    unseen = np.random.default_rng(seed).random(grid.num_tokens) < share
    compression, name, layers = METHODS[method]
    around = region.widened(data.draw(st.sampled_from([0.0, 0.1])))
    visible = ~unseen | grid.mask(around)
    plans = []
    with pytest.MonkeyPatch.context() as changed:
        for compiled in (False, True):
            changed.setattr(planning, "_compiled", None)
            assert not compiled or planning.use_compiled()
            planning._plan_counts.cache.clear()
            try:
                plan = make_plan(grid, region, rate, compression, name, 32, layers, around, unseen)
            except BudgetError:
                return
            finally:
                planning._plan_counts.cache.clear()
            plans.append(plan)
    counts = retained_per_stage(grid.num_tokens, rate, name, 32, layers)
    expected = [min(count, int(visible.sum())) for count in counts]
    assert plans[0].num_embeddings == expected[0]
    assert plans[0].tokens_per_layer(32)[-1] == expected[-1]
    assert (plans[0].assignment[~visible] == -1).all()
    assert plans[0] == plans[1]


def cpu_ms(call: Callable[[], object], repeats: int) -> float:
    """The quickest of several calls, in CPU time: what else the machine does matters little."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


# With room for a slow machine that is busy with other things; what one machine took is in CHANGELOG.
@pytest.mark.parametrize("method", ["pool", "prune", "plc+ilp", "plc+ilp, two"])
@pytest.mark.parametrize(("side", "bound_ms"), [(24, 0.3), (128, 5.0)])
def test_planning_is_no_bottleneck(side: int, bound_ms: float, method: str, split_by: str) -> None:
    grid = TokenGrid(side, side)
    compression, name, layers = METHODS[method]
    rates = itertools.count(0.778, 1e-9)  # never the same plan, or the cache would answer
    quick = cpu_ms(lambda: make_plan(grid, MIDDLE, next(rates), compression, name, 32, layers), repeats=20)
    assert quick < (2 if split_by == "compiled" else 10) * bound_ms


def test_planning_is_quicker_than_token_by_token() -> None:
    grid = TokenGrid(128, 128)
    rates = itertools.count(0.778, 1e-9)
    quick = cpu_ms(lambda: make_plan(grid, MIDDLE, next(rates), "pool"), repeats=20)
    assert cpu_ms(lambda: slow_plan(grid, MIDDLE, 0.778, "pool"), repeats=2) > 8 * quick


def test_without_numba_plans_are_made_by_numpy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planning, "_compiled", None)
    monkeypatch.delitem(sys.modules, "vllm_crop.planning.compiled_plan", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with caplog.at_level("INFO", "vllm.plugins.crop"):
        assert not planning.use_compiled()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "by numpy" in caplog.text
    assert make_plan(TokenGrid(8, 8), MIDDLE, 0.51, "pool").num_embeddings == 31


def test_objects_of_the_compiler_have_attributes_that_vllm_can_look_through() -> None:
    """As vllm/triton_utils/dispatcher.py does when a CPU worker starts; it ends at the first that has not."""
    pytest.importorskip("numba")
    assert planning.use_compiled()
    compiler = [module for name, module in sys.modules.items() if name.startswith(("numba", "llvmlite"))]
    assert len(compiler) > 100
    for module in compiler:
        for value in list(vars(module).values()):
            if hasattr(value, "__dict__"):
                assert isinstance(vars(value), Mapping), (module, value)


def test_compiled_code_is_not_kept_where_no_folder_can_be_written_to() -> None:
    pytest.importorskip("numba")
    program = (
        "from unittest import mock; from numba.core import caching\n"
        "from vllm_crop.planning import plan as planning\n"
        "with mock.patch.object(caching.CacheImpl, '_locator_classes', []): assert planning.use_compiled()"
    )
    env = {**os.environ, "NUMBA_OPT": "0"}  # it is compiled all the same, and sooner
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=env)


def test_a_whole_image_costs_next_to_nothing() -> None:
    grid = TokenGrid(128, 128)
    assert cpu_ms(lambda: whole_image_plan(grid), repeats=50) < 0.3
