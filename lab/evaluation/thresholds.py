# SPDX-License-Identifier: Apache-2.0
"""What the localizer's confidence is worth: accuracy against tokens if doubtful regions are not used.

Below a threshold the image is served whole (`localizer.whole_below`). Both answers are known by then, that
with the region and that of the unpruned model: nothing is asked again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lab.evaluation.conditions import CROP_METHODS, LOCATE, OFF
from lab.evaluation.questions import TestScene
from lab.evaluation.store import ConditionResult
from lab.evaluation.summary import GroupScore, summarize

THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class ThresholdRow:
    """One threshold with one method and rate.

    Attributes:
        used: share of the questions whose region was used; those answered "whole" count as not used.
        groups: scores by group of families, as in the table.
    """

    method: str
    pruning_rate: float
    whole_below: float
    used: float
    groups: dict[str, GroupScore]


def sweep(scenes: Sequence[TestScene], results: Sequence[ConditionResult]) -> list[ThresholdRow]:
    """Every threshold for every method and rate with the localizer's regions; empty without confidences."""
    located = next((one for one in results if one.condition.method == LOCATE), None)
    unpruned = next((one for one in results if one.condition == OFF), None)
    if located is None or unpruned is None or any(one.confidence is None for one in located.answers):
        return []
    confidences = [answer.confidence or 0.0 for answer in located.answers]
    served = [
        one
        for one in results
        if one.condition.method in CROP_METHODS and one.condition.region == "localizer" and not one.impossible
    ]
    return [
        _row(scenes, result, unpruned, confidences, threshold)
        for result in served
        for threshold in THRESHOLDS
    ]


def _row(
    scenes: Sequence[TestScene],
    result: ConditionResult,
    unpruned: ConditionResult,
    confidences: Sequence[float],
    threshold: float,
) -> ThresholdRow:
    triples = list(zip(result.answers, unpruned.answers, confidences, strict=True))
    answers = tuple(pruned if sure >= threshold else whole for pruned, whole, sure in triples)
    _, row = summarize(scenes, [unpruned, replace(result, answers=answers)])
    used = sum(
        answer.visual_tokens < whole.visual_tokens
        for answer, (_, whole, _) in zip(answers, triples, strict=True)
    )
    assert result.condition.pruning_rate is not None
    return ThresholdRow(
        result.condition.method, result.condition.pruning_rate, threshold, used / len(answers), row.groups
    )
