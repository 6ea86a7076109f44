# SPDX-License-Identifier: Apache-2.0
"""Shares and spreads, each with the number of answers it rests on. Pure Python."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_crop.measuring.shares import wilson


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
