# SPDX-License-Identifier: Apache-2.0
"""KV memory by groups of layers, against a table of fractions computed with vLLM's own grouping code."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_crop.eviction.grouping import (
    KVGrouping,
    packed_block_sizes,
    predict_grouping,
    predict_packed_grouping,
)
from vllm_crop.eviction.report import describe, nearest_good_layers, warning

PROMPT = 640  # tokens, 576 of them of one image
ONE_STAGE, TWO_STAGES = (640, 128), (640, 256, 128)  # tokens of the pruned request in each stage


def fractions(grouping: KVGrouping, pruned: tuple[int, ...]) -> tuple[float, float, float]:
    """Pruned, ideal and unpruned memory as fractions of plain vLLM's."""
    plain = grouping.plain_layer_tokens(PROMPT)
    assert plain == PROMPT * grouping.num_layers  # a multiple of the block size
    taken = (
        grouping.layer_tokens(pruned),
        grouping.ideal_layer_tokens(pruned),
        grouping.layer_tokens([PROMPT] * len(pruned)),
    )
    return tuple(layer_tokens / plain for layer_tokens in taken)


@pytest.mark.parametrize(
    ("num_layers", "eviction_layers", "group_sizes", "expected"),
    [
        (32, (2,), [2] * 16, (0.250, 0.250, 1.000)),
        (32, (3,), [3] * 10 + [2], (0.281, 0.275, 1.031)),
        (32, (8,), [8] * 4, (0.400, 0.400, 1.000)),
        (32, (12,), [12, 10, 10], (0.525, 0.500, 1.125)),
        (32, (16,), [16, 16], (0.600, 0.600, 1.000)),
        (30, (12,), [12, 9, 9], (0.560, 0.520, 1.200)),  # 18 is not less than 1.5 x 12
        (28, (2,), [2] * 14, (0.257, 0.257, 1.000)),
        (28, (8,), [8, 7, 7, 6], (0.457, 0.429, 1.143)),
        (28, (12,), [12, 16], (0.686, 0.543, 1.143)),
        (40, (2,), [2] * 20, (0.240, 0.240, 1.000)),
        (40, (8,), [8] * 5, (0.360, 0.360, 1.000)),
        (32, (2, 16), [2] * 16, (0.3375, 0.3375, 1.000)),
        (32, (8, 16), [8] * 4, (0.450, 0.450, 1.000)),
    ],
)
def test_usual_layouts(
    num_layers: int,
    eviction_layers: tuple[int, ...],
    group_sizes: list[int],
    expected: tuple[float, float, float],
) -> None:
    grouping = predict_grouping(num_layers, eviction_layers, block_size=16)
    assert [group.num_layers for group in grouping.groups] == group_sizes
    pruned = ONE_STAGE if len(eviction_layers) == 1 else TWO_STAGES
    assert fractions(grouping, pruned) == pytest.approx(expected, abs=6e-4)
    assert grouping.padding_fraction == pytest.approx(expected[2] - 1, abs=6e-4)


@pytest.mark.parametrize(
    ("num_layers", "eviction_layers", "block_sizes", "expected"),
    [
        (32, (2,), (240, 16), (0.258, 0.250, 1.008)),
        (32, (3,), (160, 16), (0.281, 0.275, 1.031)),
        (32, (8,), (48, 16), (0.4125, 0.400, 1.0125)),
        (40, (2,), (304, 16), (0.261, 0.240, 1.021)),
        (32, (2, 16), (128, 16, 16), (0.3625, 0.3375, 1.0625)),
    ],
)
def test_blocks_outermost(
    num_layers: int,
    eviction_layers: tuple[int, ...],
    block_sizes: tuple[int, ...],
    expected: tuple[float, float, float],
) -> None:
    grouping = predict_packed_grouping(num_layers, eviction_layers, 16, block_sizes)
    assert len(grouping.groups) == len(eviction_layers) + 1
    pruned = ONE_STAGE if len(eviction_layers) == 1 else TWO_STAGES
    assert fractions(grouping, pruned) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("num_layers", "eviction_layers", "block_sizes", "padding"),
    [
        (32, (2,), (240, 16), 0),
        (32, (3,), (144, 16), 29 * 10 / 9 / 32 - 1),
        (32, (8,), (48, 16), 0),
        (32, (16,), (16, 16), 0),
        (32, (12,), (80, 48), 0),
        (24, (11,), (16, 16), 2 * 13 / 24 - 1),  # 64 and 48 pad less, but leave more empty in last blocks
        (40, (2,), (256, 16), 38 * 17 / 16 / 40 - 1),  # 304 would waste nothing, but align hits to 304
        (32, (2, 16), (128, 16, 16), 16 * 17 / 8 / 32 - 1),
    ],
)
def test_chosen_block_sizes(
    num_layers: int, eviction_layers: tuple[int, ...], block_sizes: tuple[int, ...], padding: float
) -> None:
    assert packed_block_sizes(num_layers, eviction_layers, 16) == block_sizes
    grouping = predict_packed_grouping(num_layers, eviction_layers, 16)
    assert grouping.block_sizes == block_sizes
    assert grouping.padding_fraction == pytest.approx(padding, abs=1e-12)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A number of decoder layers and eviction layers."""
    num_layers = draw(st.integers(4, 80))
    layers = draw(st.sets(st.integers(1, num_layers - 1), min_size=1, max_size=3))
    return num_layers, tuple(sorted(layers))


@given(stacks(), st.sampled_from([16, 32, 64, 128, 256, 512]))
def test_one_group_a_stage_and_a_small_alignment(stack: tuple[int, tuple[int, ...]], block_size: int) -> None:
    grouping = predict_packed_grouping(*stack, block_size)
    assert [group.stage for group in grouping.groups] == list(range(len(stack[1]) + 1))
    assert all(size % block_size == 0 for size in grouping.block_sizes)
    assert math.lcm(*grouping.block_sizes) <= max(256, 2 * block_size)


@given(stacks(), st.booleans(), st.data())
def test_bounds(stack: tuple[int, tuple[int, ...]], packed: bool, data: st.DataObject) -> None:
    num_layers, eviction_layers = stack
    predict = predict_packed_grouping if packed else predict_grouping
    grouping = predict(num_layers, eviction_layers, 16)
    assert sum(group.num_layers for group in grouping.groups) == num_layers
    assert grouping.padding_fraction >= 0
    kept = data.draw(st.lists(st.integers(0, 4000), min_size=len(stack[1]) + 1, max_size=len(stack[1]) + 1))
    tokens = sorted(kept, reverse=True)
    assert grouping.ideal_layer_tokens(tokens) <= grouping.layer_tokens(tokens)
    # Long unpruned requests approach the padding from above.
    long = 16 * 10**6 + 1
    taken = grouping.layer_tokens([long] * len(tokens)) / grouping.plain_layer_tokens(long)
    assert taken - 1 == pytest.approx(grouping.padding_fraction, abs=1e-3)


def test_memory_is_rounded_up_to_blocks() -> None:
    grouping = predict_grouping(32, (8,), block_size=16)
    assert grouping.layer_tokens((17, 1)) == 8 * 16 * (2 + 3)
    assert grouping.plain_layer_tokens(17) == 32 * 32
    assert grouping.layer_tokens((0, 0)) == grouping.plain_layer_tokens(0) == 0


@pytest.mark.parametrize("eviction_layers", [(0,), (32,), (8, 8), (9, 8), (-1,)])
def test_impossible_layers(eviction_layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"increase within 1\.\.31"):
        predict_grouping(32, eviction_layers, 16)


def test_token_counts_must_match_the_stages() -> None:
    for counts in ((640,), (640, 128, 64)):
        with pytest.raises(ValueError, match="argument"):
            predict_grouping(32, (8,), 16).layer_tokens(counts)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("num_layers", "eviction_layers", "tolerance"),
    [(32, (12,), 0.05), (28, (12,), 0.0), (28, (8,), 0.05), (13, (4, 8), 0.0), (12, (2, 9), 0.04)],
)
def test_nearest_layers_by_brute_force(
    num_layers: int, eviction_layers: tuple[int, ...], tolerance: float, packed: bool
) -> None:
    predict = predict_packed_grouping if packed else predict_grouping

    def wasteful(layers: tuple[int, ...]) -> bool:
        return predict(num_layers, layers, 16).padding_fraction > tolerance

    def change(layers: tuple[int, ...]) -> int:
        return sum(abs(new - old) for new, old in zip(layers, eviction_layers, strict=True))

    best = None
    if wasteful(eviction_layers):
        good = [c for c in combinations(range(1, num_layers), len(eviction_layers)) if not wasteful(c)]
        best = min(good, key=lambda layers: (change(layers), layers), default=None)
    found = nearest_good_layers(num_layers, eviction_layers, 16, tolerance, packed=packed)
    assert found == best


def test_nearest_layers() -> None:
    assert nearest_good_layers(28, (12,), 16) == (14,)
    assert nearest_good_layers(32, (8,), 16) is None  # nothing to mend
    assert nearest_good_layers(8, (3,), 16) == (2,)  # 4 is as near and as good, but later
    assert nearest_good_layers(8, (3,), 16, first=3) == (4,)
    assert nearest_good_layers(3, (1, 2), 16, tolerance=-1) is None  # nothing does better


def test_described() -> None:
    assert describe(predict_grouping(32, (3,), 16), image_tokens=576, kept_per_stage=[576, 64]) == [
        "KV cache groups: 11 (layers 0-2: 1 x 3; layers 3-31: 10 x 2-3).",
        "Padding makes an unpruned request take 3.1% more KV memory than in plain vLLM.",
        "With one image of 576 tokens, 64 kept, and 64 text tokens a request takes 28.1% of plain vLLM's KV "
        "memory (ideal 27.5%, unpruned 103.1%).",
    ]
    groups, _, request = describe(predict_packed_grouping(32, (2, 16), 16), 500, [500, 192, 64], 140)
    assert groups == "KV cache groups: 3 (layers 0-1: 1 x 2; layers 2-15: 1 x 14; layers 16-31: 1 x 16)."
    assert request.startswith(
        "With one image of 500 tokens, 192, then 64 kept, and 140 text tokens a request"
    )


def test_warned() -> None:
    assert warning(predict_grouping(28, (12,), 16)) == (
        "eviction_layers [12] of 28 layers make an unpruned request take 14.3% more KV memory than in plain "
        "vLLM; the nearest that stay within 5% are [14]."
    )
    assert warning(predict_grouping(32, (3,), 16)) is None
    assert warning(predict_packed_grouping(28, (12,), 16)) is None
    packed = warning(predict_packed_grouping(32, (2, 16), 16))
    assert packed is not None
    assert packed.endswith("stay within 5% are [1, 16].")
