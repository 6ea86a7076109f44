# SPDX-License-Identifier: Apache-2.0
"""The curriculum: letters, then names and answers, then both parts together, then fewer tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lab.pages.training.lessons import ON, ROW

# Reading on and reading rows teach most at first: every word of their answers must be found.
FIRST = {"read": 1.0, "twin": 0.5, "compare": 0.3, "follow": 0.5, "count": 0.2, ON: 3.0, ROW: 2.0}
THEN = {"read": 1.0, "twin": 1.0, "compare": 1.5, "follow": 1.5, "count": 1.5, ON: 0.3, ROW: 0.3}


@dataclass(frozen=True)
class Phase:
    """Part of the training.

    Attributes:
        learning_rate: at the start; it falls to `final_rate` of it along a cosine.
        tokens: about so many visual tokens a step.
        questions: of each page; 0 for letters alone.
        letters: weight of the loss of letters.
        names: weight of the loss of names.
        tower: whether the vision tower is trained; where not, what it says of a page is computed once.
        scales: of pictures.
        fewer: share of steps with fewer visual tokens.
    """

    name: str
    steps: int
    learning_rate: float
    tokens: int
    questions: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    letters: float = 1.0
    names: float = 0.0
    tower: bool = True
    scales: tuple[float, ...] = (1.0,)
    fewer: float = 0.0
    final_rate: float = 0.1


PHASES = (
    Phase("letters", 5000, 2e-3, 2048, final_rate=0.3),
    Phase("reading", 6000, 2e-3, 1536, 12, FIRST, 0.0, 1.0, tower=False, final_rate=0.5),
    Phase("asking", 12_000, 1.5e-3, 1536, 16, THEN, 0.0, 0.3, tower=False, final_rate=0.3),
    Phase("together", 6000, 7e-4, 1536, 16, THEN, 0.1, 0.1),
    Phase("fewer", 6000, 5e-4, 1536, 16, THEN, 0.05, 0.1, scales=(1.0, 1.0, 0.75, 0.5), fewer=0.5),
)


def share_of(phase: Phase) -> float:
    """The part of all steps that is a phase's."""
    return phase.steps / sum(each.steps for each in PHASES)
