# SPDX-License-Identifier: Apache-2.0
"""From answers to the table: accuracy, retention and cost of every condition, and who is clear of whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from statistics import fmean

from lab.evaluation.asking import Answer
from lab.evaluation.conditions import LOCATE, OFF, Condition
from lab.evaluation.prefill_work import PrefillWork, share_of_unpruned
from lab.evaluation.questions import TestScene
from lab.evaluation.stats import Estimate, retention, wilson
from lab.evaluation.store import ConditionResult
from lab.evaluation.times import Times, ttft
from lab.tinyvqa.questions import FAMILIES, LOCAL

GROUPS: dict[str, tuple[str, ...]] = {"local": LOCAL, "all": FAMILIES}


@dataclass(frozen=True)
class GroupScore:
    """A condition's answers to some families.

    Attributes:
        retained: share of the unpruned model's accuracy, None if that is zero.
        visual_tokens: per image, averaged over layers and questions.
        kv_tokens: the same of the whole prompt.
        localizer_tokens: visual tokens of the pass in which the model found the region, averaged alike; None
            where nobody knows.
        localizer_steps: how many tokens it said in that pass, on average.
        prefill_work: of the language model until the answer begins, that pass included, as a share of the
            unpruned prompt's; None where nobody knows.
    """

    asked: int
    accuracy: Estimate
    retained: Estimate | None
    visual_tokens: float
    kv_tokens: float
    prompt_tokens: float
    localizer_tokens: float | None = None
    localizer_steps: float | None = None
    prefill_work: float | None = None

    @property
    def total_tokens(self) -> float:
        """Visual tokens of both passes."""
        return self.visual_tokens + (self.localizer_tokens or 0.0)


@dataclass(frozen=True)
class Row:
    """A condition of the grid with its scores, by group and by family; no scores where it is impossible.

    Attributes:
        ttft_ms: median time to first token, where it was measured.
        ttft_share: the median of its shares of the unpruned model's.
    """

    condition: Condition
    engine: str
    groups: dict[str, GroupScore]
    families: dict[str, Estimate]
    impossible: str | None = None
    ttft_ms: float | None = None
    ttft_share: float | None = None


def right_answers(scenes: Sequence[TestScene], result: ConditionResult) -> list[bool]:
    """Exact match, question by question."""
    expected = [question.answer for scene in scenes for question in scene.questions]
    return [answer.text == wanted for answer, wanted in zip(result.answers, expected, strict=True)]


def summarize(
    scenes: Sequence[TestScene],
    results: Sequence[ConditionResult],
    times: Times | None = None,
    work: PrefillWork | None = None,
) -> list[Row]:
    """A row per condition, in the order of the results; the unpruned model's is among them."""
    families = families_of(scenes)
    base = next(result for result in results if result.condition == OFF)
    found = next((result.answers for result in results if result.condition.method == LOCATE), None)
    return [
        _timed(_row(scenes, families, result, base, found, work), times or {})
        for result in results
        if result.condition.method != LOCATE
    ]


def _timed(row: Row, times: Times) -> Row:
    ms, share = ttft(times, row.condition) or (None, None)
    return replace(row, ttft_ms=ms, ttft_share=share)


def families_of(scenes: Sequence[TestScene]) -> list[str]:
    """The family of every question, in order."""
    return [question.family for scene in scenes for question in scene.questions]


def _row(
    scenes: Sequence[TestScene],
    families: Sequence[str],
    result: ConditionResult,
    base: ConditionResult,
    located: Sequence[Answer] | None,
    work: PrefillWork | None,
) -> Row:
    if result.impossible:
        return Row(result.condition, result.engine, {}, {}, result.impossible)
    right, wanted = right_answers(scenes, result), right_answers(scenes, base)
    located = located if result.condition.locates else ()
    groups = {
        name: _group(result, right, base, wanted, [family in of for family in families], located, work)
        for name, of in GROUPS.items()
    }
    by_family = {}
    for family in FAMILIES:
        chosen = list(compress(right, [one == family for one in families]))
        by_family[family] = wilson(sum(chosen), len(chosen))
    return Row(result.condition, result.engine, groups, by_family)


def _group(
    result: ConditionResult,
    right: Sequence[bool],
    base: ConditionResult,
    wanted: Sequence[bool],
    chosen: Sequence[bool],
    located: Sequence[Answer] | None,
    work: PrefillWork | None,
) -> GroupScore:
    """`located`: the localizer's answers, none where it was not asked, None where nobody knows them."""
    ours, theirs = list(compress(right, chosen)), list(compress(wanted, chosen))
    answers = list(compress(result.answers, chosen))
    found = None if located is None else list(compress(located, chosen))
    unpruned = list(compress(base.answers, chosen))
    return GroupScore(
        len(ours),
        wilson(sum(ours), len(ours)),
        retention(ours, theirs),
        fmean(answer.visual_tokens for answer in answers),
        fmean(answer.kv_tokens for answer in answers),
        fmean(answer.prompt_tokens for answer in answers),
        None if found is None else _mean([one.visual_tokens for one in found]),
        None if found is None else _mean([one.steps for one in found]),
        None if work is None else share_of_unpruned(work, result.condition, answers, unpruned, found),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Zero of nothing; None where one is unknown."""
    known = [value for value in values if value is not None]
    return None if len(known) < len(values) else fmean(known or [0.0])
