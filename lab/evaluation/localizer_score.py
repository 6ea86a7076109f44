# SPDX-License-Identifier: Apache-2.0
"""How good the model's own regions are."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lab.evaluation.conditions import LOCATE
from lab.evaluation.questions import TestScene
from lab.evaluation.regions import area, coverage, parse_location
from lab.evaluation.stats import Estimate, wilson
from lab.evaluation.store import ConditionResult
from lab.evaluation.times import Times, ttft
from vllm_crop.localizers.dialects import WHOLE


@dataclass(frozen=True)
class LocalizerScore:
    """How good the model's own regions are.

    Attributes:
        covered: local questions whose minimal region is covered entirely.
        coverage: share of the minimal region's conditions covered, on average.
        area: share of the image's conditions, on average over local questions.
        whole: search and count questions answered with the whole image.
        unreadable: answers that are no location; the image is served whole then.
        ms: median time of one such request, thumbnail to last digit; comes on top of a TTFT.
        visual_tokens: of one such request, on average over layers and questions.
        steps: tokens said to a question, on average; None where nobody counted.
    """

    covered: Estimate
    coverage: float
    area: float
    whole: Estimate
    unreadable: int
    asked: int
    ms: float | None
    visual_tokens: float | None = None
    steps: float | None = None


def score_localizer(
    scenes: Sequence[TestScene], results: Sequence[ConditionResult], times: Times | None = None
) -> LocalizerScore | None:
    """From the localizer's own condition; None where nobody asked it."""
    result = next((one for one in results if one.condition.method == LOCATE), None)
    if result is None:
        return None
    said = iter(result.answers)
    local: list[tuple[float, float]] = []
    whole: list[bool] = []
    unreadable = 0
    for scene in scenes:
        side = scene.scene.side
        for question in scene.questions:
            text = next(said).text
            region = parse_location(text)
            unreadable += region is None
            if question.boxes:
                local.append((coverage(region, question, side), area(region, side)))
            else:
                whole.append(text == WHOLE)
    covered, areas = [one[0] for one in local], [one[1] for one in local]
    entirely = wilson(sum(share == 1 for share in covered), len(covered))
    steps = [answer.steps for answer in result.answers if answer.steps is not None]
    return LocalizerScore(
        entirely,
        fmean(covered),
        fmean(areas),
        wilson(sum(whole), len(whole)),
        unreadable,
        len(local) + len(whole),
        timed[0] if (timed := ttft(times or {}, result.condition)) else None,
        fmean(answer.visual_tokens for answer in result.answers),
        fmean(steps) if len(steps) == len(result.answers) else None,
    )
