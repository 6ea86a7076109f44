# SPDX-License-Identifier: Apache-2.0
"""Shares and spreads, each with the number of answers it rests on. Pure Python."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_crop.measuring.shares import Z, wilson


@dataclass(frozen=True)
class Share:
    """`count` of `n`; `low` and `high` are the ends of the 95 percent interval. None where n is 0."""

    count: int
    n: int
    share: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Percent, interval and n: `97.5 % (87-100), n 40`."""
        if self.share is None or self.low is None or self.high is None:
            return "-"
        interval = f"{100 * self.low:.0f}-{100 * self.high:.0f}"
        return f"{100 * self.share:.1f} % ({interval}), n {self.n}"


def share(outcomes: Iterable[bool]) -> Share:
    """How many of the outcomes are true, with Wilson's interval."""
    known = list(outcomes)
    if not known:
        return Share(0, 0, None, None, None)
    estimate = wilson(sum(known), len(known))
    return Share(sum(known), len(known), estimate.value, estimate.low, estimate.high)


@dataclass(frozen=True)
class Mean:
    """Mean of `n` values of `groups` independent groups, with the ends of its 95 percent interval."""

    value: float
    low: float
    high: float
    n: int
    groups: int

    def __str__(self) -> str:
        """In hundredths, interval and n: `83.1 (80.2-86.0), n 500`."""
        low, high = (f"{100 * one:.1f}" for one in (self.low, self.high))
        interval = f"{low} to {high}" if self.groups > 1 else "one group"
        return f"{100 * self.value:.1f} ({interval}), n {self.n}"


def grouped_mean(values: Sequence[float], groups: Sequence[str]) -> Mean | None:
    """The mean of values that are independent between groups only; None of nothing.

    The interval is the normal one with the standard error of clusters (Cameron and Miller 2015, equation 11,
    with G/(G-1)). A single group tells nothing of others: its interval has no end.
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    sums: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    count = len(sums)
    variance = sum(one * one for one in sums.values()) / len(values) ** 2
    half = Z * math.sqrt(variance * count / (count - 1)) if count > 1 else math.inf
    return Mean(mean, mean - half, mean + half, len(values), count)


@dataclass(frozen=True)
class Spread:
    """`n` values: mean, median and the tenth and ninetieth percentile; smallest and largest."""

    n: int
    mean: float
    median: float
    p10: float
    p90: float
    smallest: float
    largest: float

    def text(self, digits: int = 0, unit: str = "") -> str:
        """Median with the percentiles in brackets and n: `120 (95-180) ms, n 40`."""
        low, high = f"{self.p10:.{digits}f}", f"{self.p90:.{digits}f}"
        return f"{self.median:.{digits}f} ({low} to {high}){unit}, n {self.n}"


def spread(values: Iterable[float]) -> Spread | None:
    """Describe the values; None where there are none. NaN is no value."""
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return None
    return Spread(
        len(known),
        statistics.fmean(known),
        statistics.median(known),
        percentile(known, 0.1),
        percentile(known, 0.9),
        known[0],
        known[-1],
    )


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which a fraction of the ascending values lies, between two of them where it must be."""
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # Of two equal values no rounding may make a third.
    return low if low == high else min(high, max(low, low + (place - below) * (high - low)))
