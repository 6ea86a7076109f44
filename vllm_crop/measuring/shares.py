# SPDX-License-Identifier: Apache-2.0
"""A share with its interval."""

import math
from dataclasses import dataclass

Z = 1.959964  # standard normal: 95 percent of it lie within


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 percent interval."""

    value: float
    low: float
    high: float


def wilson(right: int, asked: int) -> Estimate:
    """The share `right / asked` with Wilson's score interval (1927).

    Raises:
        ValueError: nothing was asked.
    """
    if asked <= 0:
        raise ValueError("a share needs at least one answer")
    share, spread = right / asked, Z * Z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    # Rounding must not push the interval off its own value.
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))
