# SPDX-License-Identifier: Apache-2.0
"""How good a place is that was found: hits, coverage, and what a confidence is worth."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_crop.planning.geometry import Box, Region

WINDOW = 0.25  # side of the window whose hits are counted, as a fraction of the picture's
HALF = 0.5
# Localizations that a threshold must leave, and their share: of fewer the best is luck.
LEAST, LEAST_SHARE = 5, 0.1


def is_hit(window: Box, needed: Region) -> bool:
    """Whether a window shows at least half of one of the needed boxes."""
    return any(coverage(Region((window,)), Region((box,))) >= HALF for box in needed.boxes)


def coverage(region: Region, needed: Region) -> float:
    """The share of the needed area that a region shows, in [0, 1]."""
    boxes = (*region.boxes, *needed.boxes)
    xs = sorted({edge for box in boxes for edge in (box.x0, box.x1)})
    ys = sorted({edge for box in boxes for edge in (box.y0, box.y1)})
    areas = np.outer(np.diff(ys), np.diff(xs))
    middles = np.add(ys[1:], ys[:-1]) / 2, np.add(xs[1:], xs[:-1]) / 2
    inside = [_inside(one, *middles) for one in (region, needed)]
    return float(areas[inside[0] & inside[1]].sum() / areas[inside[1]].sum())


def area(region: Region) -> float:
    """The share of the picture that a region takes."""
    return coverage(region, Region.whole())


def window_around(x: float, y: float, side: float = WINDOW) -> Box:
    """The window with this middle, moved where it would leave the picture."""
    x0, y0 = (min(max(0.0, middle - side / 2), 1.0 - side) for middle in (x, y))
    return Box(x0, y0, x0 + side, y0 + side)


def random_windows(count: int, seed: int) -> Iterator[Box]:
    """Windows anywhere within the picture."""
    chance = random.Random(seed)
    for _ in range(count):
        yield window_around(*(WINDOW / 2 + chance.random() * (1 - WINDOW) for _ in range(2)))


def auroc(confidences: Sequence[float], right: Sequence[bool]) -> float | None:
    """The probability that a right place has a higher confidence than a wrong one; None without both."""
    told = np.array(confidences, dtype=np.float64)
    is_right = np.array(right, dtype=bool)
    ours, others = told[is_right], told[~is_right]
    if not len(ours) or not len(others):
        return None
    above = (ours[:, None] > others).mean() + 0.5 * (ours[:, None] == others).mean()
    return float(above)


@dataclass(frozen=True)
class Kept:
    """What a threshold leaves to prune.

    Attributes:
        count: localizations whose confidence reaches it.
        coverage: their mean; None of none.
    """

    count: int
    n: int
    coverage: float | None


def kept(threshold: float, confidences: Sequence[float], covered: Sequence[float]) -> Kept:
    """Count the localizations that reach a threshold."""
    left = [one for told, one in zip(confidences, covered, strict=True) if told >= threshold]
    return Kept(len(left), len(confidences), sum(left) / len(left) if left else None)


def most_covered(confidences: Sequence[float], covered: Sequence[float]) -> float:
    """The largest mean coverage that a threshold leaving enough of them has."""
    least = max(LEAST, LEAST_SHARE * len(confidences))
    left = [kept(threshold, confidences, covered) for threshold in {0.0, *confidences}]
    return max((one.coverage for one in left if one.count >= least and one.coverage is not None), default=0.0)


def lowest_threshold(confidences: Sequence[float], covered: Sequence[float], wanted: float) -> float | None:
    """The lowest confidence from which on regions cover `wanted` of what is needed in the mean.

    0 if all of them do together; None if none does that leaves enough of them.
    """
    least = max(LEAST, LEAST_SHARE * len(confidences))
    order = sorted(set(confidences))
    for below, threshold in zip([0.0, *order], order, strict=False):
        left = kept(threshold, confidences, covered)
        if left.count < least or left.coverage is None:
            return None
        if left.coverage >= wanted:
            # Halfway to the next lower one, which stays below; of all, 0.
            return 0.0 if left.count == left.n else (below + threshold) / 2
    return None


def _inside(region: Region, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    marked = np.zeros((len(ys), len(xs)), dtype=bool)
    for box in region.boxes:
        marked |= np.outer((box.y0 < ys) & (ys < box.y1), (box.x0 < xs) & (xs < box.x1))
    return marked
