# SPDX-License-Identifier: Apache-2.0
"""Condition against condition: CROP's margin over others, and engine against plain transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from lab.evaluation.conditions import CROP_METHODS, Condition
from lab.evaluation.questions import TestScene
from lab.evaluation.stats import Estimate, difference
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.summary import families_of, right_answers
from lab.tinyvqa.questions import LOCAL


@dataclass(frozen=True)
class Margin:
    """How much more local questions CROP answers right than another method at the same rate, paired."""

    pruning_rate: float
    method: str
    against: str
    gained: Estimate


@dataclass(frozen=True)
class Agreement:
    """How many answers of a condition are word for word those of plain transformers."""

    condition: Condition
    engine: str
    same: int
    asked: int


def margins(scenes: Sequence[TestScene], results: Sequence[ConditionResult]) -> list[Margin]:
    """CROP with the model's own regions against all others at the same rate, pooling evenly among them."""
    local = [family in LOCAL for family in families_of(scenes)]
    found = []
    possible = [
        result for result in results if not result.impossible and result.condition.pruning_rate is not None
    ]
    for ours in possible:
        if ours.condition.method not in CROP_METHODS or ours.condition.region != "localizer":
            continue
        for other in possible:
            same_rate = other.condition.pruning_rate == ours.condition.pruning_rate
            if same_rate and (
                other.condition.method not in CROP_METHODS or other.condition.region == "whole"
            ):
                pair = [list(compress(right_answers(scenes, one), local)) for one in (ours, other)]
                assert ours.condition.pruning_rate is not None
                gained = difference(*pair)
                found.append(
                    Margin(ours.condition.pruning_rate, ours.condition.row, other.condition.row, gained)
                )
    return found


def agreements(results: Sequence[ConditionResult], store: Store) -> list[Agreement]:
    """Of all conditions that plain transformers have answered too, in this folder."""
    found = []
    for result in results:
        other = None if result.engine == "transformers" else store.load(result.condition, "transformers")
        if other is not None and result.answers and other.answers:
            pairs = zip(result.answers, other.answers, strict=True)
            same = sum(one.text == two.text for one, two in pairs)
            found.append(Agreement(result.condition, result.engine, same, len(result.answers)))
    return found
