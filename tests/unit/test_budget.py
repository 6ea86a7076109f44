# SPDX-License-Identifier: Apache-2.0
"""The budget over layers: counts per stage against brute force, and errors that name what would do."""

import itertools
import re

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from strategies import eviction_settings

from vllm_crop.planning.budget import (
    BudgetError,
    Method,
    check_eviction_layers,
    method_evicts,
    retained_count,
    retained_per_stage,
)

EVICTING: tuple[Method, ...] = ("ilp", "plc+ilp")
rates = st.one_of(st.floats(0, 0.999), st.integers(0, 99).map(lambda hundredths: hundredths / 100))
evicting = st.sampled_from(EVICTING)


def average(counts: tuple[int, ...], num_layers: int, layers: tuple[int, ...]) -> float:
    """Tokens per layer, one layer after the other."""
    per_layer = [counts[sum(layer >= start for start in layers)] for layer in range(num_layers)]
    return sum(per_layer) / num_layers


def possible_counts(num_tokens: int, method: Method, num_stages: int) -> list[tuple[int, ...]]:
    """Every way to keep fewer and fewer."""
    ways = itertools.combinations_with_replacement(range(num_tokens, 0, -1), num_stages + 1)
    return [counts for counts in ways if method != "ilp" or counts[0] == num_tokens]


@given(st.integers(1, 3000), rates, evicting, eviction_settings())
def test_counts_never_increase_and_meet_the_rate_to_the_token(
    num_tokens: int, rate: float, method: Method, evictions: tuple[int, tuple[int, ...]]
) -> None:
    num_layers, layers = evictions
    try:
        counts = retained_per_stage(num_tokens, rate, method, num_layers, layers)
    except BudgetError:
        assume(False)
    assert len(counts) == len(layers) + 1
    assert list(counts) == sorted(counts, reverse=True)
    assert 1 <= counts[-1] <= counts[0] <= num_tokens
    assert method != "ilp" or counts[0] == num_tokens
    target = max(1, num_tokens * (1 - rate))
    assert abs(average(counts, num_layers, layers) - target) <= 0.5 + 1e-6


@given(st.integers(1, 9), rates, evicting, eviction_settings(10, 3))
def test_it_is_an_error_exactly_where_no_counts_would_do(
    num_tokens: int, rate: float, method: Method, evictions: tuple[int, tuple[int, ...]]
) -> None:
    num_layers, layers = evictions
    target = max(1, num_tokens * (1 - rate))
    misses = [
        abs(average(counts, num_layers, layers) - target)
        for counts in possible_counts(num_tokens, method, len(layers))
    ]
    assume(abs(min(misses) - 0.5) > 1e-9)
    if min(misses) < 0.5:
        retained_per_stage(num_tokens, rate, method, num_layers, layers)
    else:
        with pytest.raises(BudgetError):
            retained_per_stage(num_tokens, rate, method, num_layers, layers)


@given(
    st.integers(1, 400),
    rates,
    st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
)
def test_one_stage_keeps_the_count_whose_average_is_nearest(
    num_tokens: int, rate: float, layers: tuple[int, int]
) -> None:
    num_layers, layer = layers
    try:
        _, kept = retained_per_stage(num_tokens, rate, "ilp", num_layers, (layer,))
    except BudgetError:
        assume(False)
    target = max(1, num_tokens * (1 - rate))

    def miss(count: int) -> float:
        return abs(average((num_tokens, count), num_layers, (layer,)) - target)

    assert miss(kept) <= min(miss(count) for count in range(1, num_tokens + 1)) + 1e-9


@given(st.integers(1, 60), rates, evicting, eviction_settings())
def test_every_stage_keeps_the_same_fraction(
    num_tokens: int, rate: float, method: Method, evictions: tuple[int, tuple[int, ...]]
) -> None:
    num_layers, layers = evictions
    try:
        counts = retained_per_stage(num_tokens, rate, method, num_layers, layers)
    except BudgetError:
        assume(False)
    first = 0 if method == "ilp" else 1
    misses = [
        max(abs(max(1, num_tokens * (step / 2000) ** (first + s)) - count) for s, count in enumerate(counts))
        for step in range(2001)
    ]
    assert min(misses) <= 0.5 + 60 * 5 / 2 / 2000  # half a token, and half a step of the search


@pytest.mark.parametrize(("rate", "kept", "mean"), [(2 / 3, 166, 192), (7 / 9, 98, 128), (8 / 9, 30, 64)])
def test_llava_evicting_from_layer_2(rate: float, kept: int, mean: int) -> None:
    counts = retained_per_stage(576, rate, "ilp", 32, (2,))
    assert counts == (576, kept)
    assert round(average(counts, 32, (2,))) == mean


def test_compression_is_the_first_stage_of_both() -> None:
    # 576 r over 16 layers and 576 r^2 over 16 more make 192 on average at r = (sqrt(11 / 3) - 1) / 2.
    assert retained_per_stage(576, 2 / 3, "plc+ilp", 32, (16,)) == (263, 121)
    assert retained_per_stage(576, 0.0, "plc+ilp", 32, (2, 16)) == (576, 576, 576)


@given(st.integers(1, 5000), rates, eviction_settings())
@example(576, 0.999, (32, (2,)))
def test_without_eviction_there_is_one_count(
    num_tokens: int, rate: float, evictions: tuple[int, tuple[int, ...]]
) -> None:
    num_layers, layers = evictions
    count = retained_per_stage(num_tokens, rate, "plc", num_layers, layers)
    assert count == (retained_count(num_tokens, rate),) == retained_per_stage(num_tokens, rate, "plc", 1, ())
    assert retained_per_stage(num_tokens, rate, "off", num_layers, ()) == (num_tokens,)


def test_methods_that_evict() -> None:
    assert [method_evicts(method) for method in ("plc", "ilp", "plc+ilp", "off")] == [
        False,
        True,
        True,
        False,
    ]


# Most rates can be met; those that cannot are what this is about.
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.integers(2, 3000), rates, eviction_settings())
@example(576, 0.95, (32, (8, 16)))
@example(576, 0.995, (32, (1,)))
def test_the_error_names_the_latest_layer_and_the_highest_rate_that_would_do(
    num_tokens: int, rate: float, evictions: tuple[int, tuple[int, ...]]
) -> None:
    num_layers, (first, *_) = evictions
    with_first = {"num_tokens": num_tokens, "method": "ilp", "num_layers": num_layers}

    def fits(pruning_rate: float, layer: int) -> bool:
        try:
            retained_per_stage(**with_first, pruning_rate=pruning_rate, eviction_layers=(layer,))
        except BudgetError:
            return False
        return True

    try:
        retained_per_stage(num_tokens, rate, *list(with_first.values())[1:], evictions[1])
        assume(False)
    except BudgetError as error:
        message = str(error)
    named = re.search(r"begin at layer (\d+) or earlier", message)
    assert named is not None or not fits(rate, 1)
    if named is not None:
        assert fits(rate, int(named[1]))
        assert not fits(rate, int(named[1]) + 1)
    highest = float(re.findall(r"pruning_rate of at most ([\d.]+)$", message)[0])
    assert highest < rate
    assert fits(highest, first)
    assert not fits(highest + 0.001, first)


def test_the_error_is_one_sentence_with_the_numbers() -> None:
    with pytest.raises(BudgetError) as refused:
        retained_per_stage(576, 0.778, "ilp", 40, (20,))
    assert str(refused.value) == (
        "0.778 leaves 127.9 of 576 tokens per layer, but method 'ilp' with eviction from layer 20 of 40 "
        "takes at least 288.5: needs eviction_layers that begin at layer 8 or earlier, or a pruning_rate of "
        "at most 0.5"
    )


@pytest.mark.parametrize("layers", [(), (0,), (32,), (2, 2), (3, 2), (2, 40), (-1, 4)])
def test_layers_the_model_cannot_evict_at_are_refused(layers: tuple[int, ...]) -> None:
    for refuse in (
        lambda: check_eviction_layers(layers, 32),
        lambda: retained_per_stage(576, 0.5, "ilp", 32, layers),
        lambda: retained_per_stage(576, 0.5, "plc+ilp", 32, layers),
    ):
        with pytest.raises(BudgetError, match=r"from 1 to 31.*32 decoder layers, got \["):
            refuse()


def test_layers_the_model_can_evict_at() -> None:
    for layers in ((1,), (31,), (1, 2, 30, 31)):
        check_eviction_layers(layers, 32)
