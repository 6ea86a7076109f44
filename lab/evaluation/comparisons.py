# SPDX-License-Identifier: Apache-2.0
"""Condition against condition: CROP's margin over others, and engine against plain transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

from lab.evaluation.conditions import CROP_METHODS, Condition
from lab.evaluation.questions import TestScene
from lab.evaluation.stats import Estimate, difference, holm, mcnemar
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.summary import families_of, right_answers, summarize
from lab.tinyvqa.questions import LOCAL


@dataclass(frozen=True)
class Margin:
    """How much more local questions CROP answers right than another method at the same rate, paired."""

    pruning_rate: float
    method: str
    against: str
    gained: Estimate


@dataclass(frozen=True)
class EqualCost:
    """The same against another method that may have as many visual tokens as both passes of CROP's.

    Attributes:
        rate: CROP's.
        tokens: of both passes, averaged over layers and local questions.
        against_rate: of the other, the lowest at which it has no more tokens.
        against_tokens: what it has then.
        chance: of so large a difference between equals (McNemar), corrected for all rows of the table (Holm).
    """

    method: str
    rate: float
    tokens: float
    against: str
    against_rate: float
    against_tokens: float
    gained: Estimate
    chance: float


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


def equal_cost(scenes: Sequence[TestScene], results: Sequence[ConditionResult]) -> list[EqualCost]:
    """CROP with the model's own regions against others, the localizer's pass included; local questions."""
    local = [family in LOCAL for family in families_of(scenes)]
    rows = {row.condition: row for row in summarize(scenes, results) if not row.impossible}
    right = {
        one.condition: list(compress(right_answers(scenes, one), local)) for one in results if one.answers
    }
    tokens = {condition: row.groups["local"].total_tokens for condition, row in rows.items()}
    others: dict[str, list[Condition]] = {}
    for condition, row in rows.items():
        if condition.pruning_rate is not None and (
            condition.method not in CROP_METHODS or condition.region == "whole"
        ):
            others.setdefault(row.condition.row, []).append(condition)
    found, chances = [], []
    for ours in rows:
        if ours.method not in CROP_METHODS or ours.region != "localizer" or ours.pruning_rate is None:
            continue
        for name, conditions in others.items():
            # Half a token: grids are rounded.
            affordable = [one for one in conditions if tokens[one] <= tokens[ours] + 0.5]
            if not affordable:
                continue
            other = max(affordable, key=tokens.__getitem__)
            assert other.pruning_rate is not None
            gained = difference(right[ours], right[other])
            chances.append(mcnemar(right[ours], right[other]))
            found.append(
                EqualCost(
                    ours.row,
                    ours.pruning_rate,
                    tokens[ours],
                    name,
                    other.pruning_rate,
                    tokens[other],
                    gained,
                    1.0,
                )
            )
    return [replace(one, chance=chance) for one, chance in zip(found, holm(chances), strict=True)]


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
