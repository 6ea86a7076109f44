# SPDX-License-Identifier: Apache-2.0
"""Shares with intervals. Pure Python: a table must be checkable with a pocket calculator."""

import math
from collections.abc import Sequence

from vllm_crop.measuring.shares import Estimate, Z, wilson

__all__ = ["Estimate", "difference", "holm", "mcnemar", "retention", "wilson"]


def retention(pruned: Sequence[bool], unpruned: Sequence[bool]) -> Estimate | None:
    """Accuracy as a share of the unpruned model's, on the same questions in the same order.

    The interval is that of the ratio of two paired means (delta method): questions that both answer alike add
    nothing to it. None if the unpruned model answers nothing right.
    """
    if len(pruned) != len(unpruned):
        raise ValueError(f"not paired: {len(pruned)} and {len(unpruned)} answers")
    count, base = len(unpruned), sum(unpruned)
    if not base:
        return None
    ratio = sum(pruned) / base
    variance = sum((after - ratio * before) ** 2 for after, before in zip(pruned, unpruned, strict=True))
    half = Z * math.sqrt(variance / max(1, count - 1) * count) / base
    return Estimate(ratio, max(0.0, ratio - half), ratio + half)


def difference(one: Sequence[bool], other: Sequence[bool]) -> Estimate:
    """How much more of the same questions the first answers right than the second, paired.

    Never narrower than a single differing answer would make it: no difference in a sample is not none at all.
    """
    if len(one) != len(other) or not one:
        raise ValueError(f"not paired: {len(one)} and {len(other)} answers")
    count = len(one)
    gaps = [int(first) - int(second) for first, second in zip(one, other, strict=True)]
    mean = sum(gaps) / count
    variance = max(sum((gap - mean) ** 2 for gap in gaps), 1.0)
    half = Z * math.sqrt(variance) / count
    return Estimate(mean, mean - half, mean + half)


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """The chance of a difference at least as large between two methods that are equally good, paired.

    McNemar's test (1947) in its exact form: of the questions that only one answers right, each is as likely
    to answer any.
    """
    only = [first for first, second in zip(one, other, strict=True) if first != second]
    count, fewer = len(only), min(sum(only), len(only) - sum(only))
    if not count:
        return 1.0
    tail: float = sum(math.comb(count, one) for one in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)


def holm(chances: Sequence[float]) -> list[float]:
    """The chances corrected for how many questions are asked (Holm 1979), in the order they came."""
    corrected, highest = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = highest
    return corrected
