# SPDX-License-Identifier: Apache-2.0
"""How much of where an answer stands was inside the region that an image was pruned by. Pure."""

from collections.abc import Sequence
from itertools import pairwise

Box = Sequence[float]  # x0, y0, x1, y1, fractions of the image


def covered(boxes: Sequence[Box], region: Sequence[Box]) -> float:
    """The share of the boxes' area that lies in a region; boxes that overlap count once."""
    total = _area(boxes, [(0.0, 0.0, 1.0, 1.0)])
    return _area(boxes, region) / total if total else 0.0


def area(region: Sequence[Box]) -> float:
    """The share of the image that a region is."""
    return _area(region, [(0.0, 0.0, 1.0, 1.0)])


def _area(some: Sequence[Box], others: Sequence[Box]) -> float:
    """Of what lies in a box of both, cell by cell between all their edges."""
    every = [*some, *others]
    xs = sorted({edge for box in every for edge in (box[0], box[2])})
    ys = sorted({edge for box in every for edge in (box[1], box[3])})
    return sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in pairwise(xs)
        for y0, y1 in pairwise(ys)
        if _inside(some, x0, y0, x1, y1) and _inside(others, x0, y0, x1, y1)
    )


def _inside(boxes: Sequence[Box], x0: float, y0: float, x1: float, y1: float) -> bool:
    return any(box[0] <= x0 and x1 <= box[2] and box[1] <= y0 and y1 <= box[3] for box in boxes)
