# SPDX-License-Identifier: Apache-2.0
"""The curriculum: small scenes first, which the model reads at any size."""

from dataclasses import dataclass

from lab.tinyvqa.training.batches import Task

# What is learnt last is asked most.
ANSWERED = {"read": 0.6, "relation": 1.2, "compare": 1.6, "search": 0.8, "count": 2.2}
LOCATED = {"read": 1.0, "relation": 1.2, "compare": 1.5, "search": 0.3, "count": 0.3}
FIRST = {"read": 2.0, "relation": 1.0, "compare": 1.0, "search": 1.0, "count": 0.5}


@dataclass(frozen=True)
class Phase:
    """Part of the training.

    Attributes:
        tasks: take turns, one batch each; none: the vision tower alone is trained.
        learning_rate: at the start; it falls to `final_rate` of it along a cosine.
        look_weight: of the loss that says where to look, at the start; it falls to zero.
        train_vision: whether the vision tower learns too.
    """

    name: str
    steps: int
    learning_rate: float
    tasks: tuple[Task, ...] = ()
    final_rate: float = 0.1
    look_weight: float = 0.0
    train_vision: bool = False


def _fewer(rate: float) -> Task:
    weights = {"read": 0.6, "relation": 1.2, "compare": 1.2}
    return Task(8, (8, 12), scenes=4, questions=2, weights=weights, views=8, pruning_rate=rate)


def _small(weights: dict[str, float], num_things: tuple[int, int]) -> Task:
    return Task(4, num_things, scenes=8, questions=16, weights=weights)


PHASES = (
    Phase("tower", 5500, 2e-3),
    Phase(
        "small",
        1200,
        3e-3,
        (_small(FIRST, (3, 6)), Task(8, (8, 12), 8, 16, FIRST, locate=True)),
        0.5,
        0.5,
    ),
    Phase(
        "large",
        2500,
        2e-3,
        (
            _small(ANSWERED, (4, 10)),
            Task(8, (8, 12), 4, 24, ANSWERED),
            Task(8, (8, 12), 8, 16, LOCATED, locate=True),
        ),
        0.1,
        0.5,
    ),
    Phase(
        "all",
        750,
        5e-4,
        (Task(8, (8, 12), 3, 32, ANSWERED), Task(8, (8, 12), 8, 16, LOCATED, locate=True)),
        0.05,
        0.3,
        True,
    ),
    Phase(
        "fewer",
        1000,
        5e-4,
        (
            _fewer(0.889),
            Task(8, (8, 12), 4, 24, ANSWERED),
            Task(8, (8, 12), 8, 16, LOCATED, locate=True),
            _fewer(0.778),
            Task(8, (8, 12), 4, 24, ANSWERED),
            _fewer(0.926),
        ),
        0.05,
        0.3,
    ),
)
