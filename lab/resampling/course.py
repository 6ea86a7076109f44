# SPDX-License-Identifier: Apache-2.0
"""How a compressor is trained; what a training that goes on must share with what was before."""

from dataclasses import dataclass
from typing import Literal

from lab.resampling.lessons import RATES

Recipe = Literal["answers", "match"]


@dataclass(frozen=True)
class Course:
    """How it is trained.

    Attributes:
        recipe: "answers" learns what is right, "match" what the unpruned model thinks.
        batch: questions a step.
        rates: of which each step has one.
    """

    recipe: Recipe = "answers"
    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 20261128
    rates: tuple[float, ...] = RATES
    cache_gib: float = 2.0
