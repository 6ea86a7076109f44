# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for grids, boxes and regions; coordinates are hundredths, so oracles can be exact."""

from fractions import Fraction

from hypothesis import strategies as st

from vllm_crop.planning.geometry import Box, Region, TokenGrid

STEPS = 100  # a box edge that misses a token edge misses it by far more than the tolerance


def grids(max_side: int = 16) -> st.SearchStrategy[TokenGrid]:
    """Grids of 1x1 up to `max_side` x `max_side` tokens."""
    side = st.integers(1, max_side)
    return st.builds(TokenGrid, side, side)


def boxes(low: int = 0, high: int = STEPS) -> st.SearchStrategy[Box]:
    """Boxes with edges at hundredths from `low` to `high`."""
    edges = st.lists(st.integers(low, high), min_size=2, max_size=2, unique=True).map(sorted)
    return st.builds(
        lambda x, y: Box(x[0] / STEPS, y[0] / STEPS, x[1] / STEPS, y[1] / STEPS),
        edges,
        edges,
    )


def regions(max_boxes: int = 3) -> st.SearchStrategy[Region]:
    """Unions of one to `max_boxes` boxes inside the image."""
    return st.lists(boxes(), min_size=1, max_size=max_boxes).map(lambda found: Region(tuple(found)))


@st.composite
def eviction_settings(
    draw: st.DrawFn, max_layers: int = 40, max_stages: int = 4
) -> tuple[int, tuple[int, ...]]:
    """A number of decoder layers and eviction layers such a model can have."""
    num_layers = draw(st.integers(2, max_layers))
    layers = st.sets(st.integers(1, num_layers - 1), min_size=1, max_size=max_stages)
    return num_layers, tuple(sorted(draw(layers)))


def exact(coordinate: float) -> Fraction:
    """The hundredth that a coordinate of these strategies stands for."""
    return Fraction(round(coordinate * STEPS), STEPS)
