# SPDX-License-Identifier: Apache-2.0
"""From answers to the table: accuracy, retention and cost of every cell, and who is clear of whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from statistics import fmean

from vllm_crop.evaluation.cells import CROP_METHODS, LOCATE, OFF, GridCell
from vllm_crop.evaluation.questions import TestScene
from vllm_crop.evaluation.regions import area, coverage, parse_location
from vllm_crop.evaluation.stats import Estimate, difference, retention, wilson
from vllm_crop.evaluation.store import CellResult, Store
from vllm_crop.tinyvqa.questions import FAMILIES, LOCAL, WHOLE

GROUPS: dict[str, tuple[str, ...]] = {"local": LOCAL, "all": FAMILIES}


@dataclass(frozen=True)
class GroupScore:
    """A cell's answers to some families.

    Attributes:
        retained: share of the unpruned model's accuracy, None if that is zero.
        visual_tokens: per image, averaged over layers and questions.
        kv_tokens: the same of the whole prompt.
    """

    asked: int
    accuracy: Estimate
    retained: Estimate | None
    visual_tokens: float
    kv_tokens: float
    prompt_tokens: float


@dataclass(frozen=True)
class Row:
    """A cell of the grid with its scores, by group and by family; no scores where it is impossible."""

    cell: GridCell
    engine: str
    groups: dict[str, GroupScore]
    families: dict[str, Estimate]
    seconds_per_question: float
    ttft_ms: float | None
    impossible: str | None


@dataclass(frozen=True)
class Margin:
    """How much more local questions CROP answers right than another method at the same rate, paired."""

    pruning_rate: float
    method: str
    against: str
    gained: Estimate


@dataclass(frozen=True)
class Agreement:
    """How many answers of a cell are word for word those of plain transformers."""

    cell: GridCell
    engine: str
    same: int
    asked: int


@dataclass(frozen=True)
class LocalizerScore:
    """How good the model's own regions are.

    Attributes:
        covered: local questions whose minimal region is covered entirely.
        coverage: share of the minimal region's cells covered, on average.
        area: share of the image's cells, on average over local questions.
        whole: search and count questions answered with the whole image.
        unreadable: answers that are no location; the image is served whole then.
        ms: median time of one such request, thumbnail to last digit; comes on top of a TTFT.
    """

    covered: Estimate
    coverage: float
    area: float
    whole: Estimate
    unreadable: int
    asked: int
    ms: float | None


def right_answers(scenes: Sequence[TestScene], result: CellResult) -> list[bool]:
    """Exact match, question by question."""
    expected = [question.answer for scene in scenes for question in scene.questions]
    return [answer.text == wanted for answer, wanted in zip(result.answers, expected, strict=True)]


def summarize(scenes: Sequence[TestScene], results: Sequence[CellResult]) -> list[Row]:
    """A row per cell, in the order of the results; the unpruned model's is among them."""
    families = _families(scenes)
    base = right_answers(scenes, next(result for result in results if result.cell == OFF))
    return [_row(scenes, families, result, base) for result in results if result.cell.method != LOCATE]


def margins(scenes: Sequence[TestScene], results: Sequence[CellResult]) -> list[Margin]:
    """CROP with the model's own regions (or, where that was not measured, true ones) against all others."""
    local = [family in LOCAL for family in _families(scenes)]
    found = []
    possible = [
        result for result in results if not result.impossible and result.cell.pruning_rate is not None
    ]
    for ours in possible:
        if ours.cell.method not in CROP_METHODS or ours.cell.region != "localizer":
            continue
        for other in possible:
            same_rate = other.cell.pruning_rate == ours.cell.pruning_rate
            if same_rate and other.cell.method not in CROP_METHODS:
                pair = [list(compress(right_answers(scenes, one), local)) for one in (ours, other)]
                assert ours.cell.pruning_rate is not None
                gained = difference(*pair)
                found.append(Margin(ours.cell.pruning_rate, ours.cell.row, other.cell.row, gained))
    return found


def score_localizer(scenes: Sequence[TestScene], results: Sequence[CellResult]) -> LocalizerScore | None:
    """From the localizer's own cell; None where nobody asked it."""
    result = next((one for one in results if one.cell.method == LOCATE), None)
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
    return LocalizerScore(
        entirely,
        fmean(covered),
        fmean(areas),
        wilson(sum(whole), len(whole)),
        unreadable,
        len(local) + len(whole),
        result.ttft_ms,
    )


def agreements(results: Sequence[CellResult], store: Store) -> list[Agreement]:
    """Of all cells that plain transformers have answered too, in this folder."""
    found = []
    for result in results:
        other = None if result.engine == "transformers" else store.load(result.cell, "transformers")
        if other is not None and result.answers and other.answers:
            pairs = zip(result.answers, other.answers, strict=True)
            same = sum(one.text == two.text for one, two in pairs)
            found.append(Agreement(result.cell, result.engine, same, len(result.answers)))
    return found


def _families(scenes: Sequence[TestScene]) -> list[str]:
    return [question.family for scene in scenes for question in scene.questions]


def _row(
    scenes: Sequence[TestScene], families: Sequence[str], result: CellResult, base: Sequence[bool]
) -> Row:
    if result.impossible:
        return Row(result.cell, result.engine, {}, {}, 0.0, None, result.impossible)
    right = right_answers(scenes, result)
    groups = {name: _group(result, right, base, [f in of for f in families]) for name, of in GROUPS.items()}
    by_family = {}
    for family in FAMILIES:
        chosen = list(compress(right, [one == family for one in families]))
        by_family[family] = wilson(sum(chosen), len(chosen))
    pace = result.seconds / len(right)
    return Row(result.cell, result.engine, groups, by_family, pace, result.ttft_ms, None)


def _group(
    result: CellResult, right: Sequence[bool], base: Sequence[bool], chosen: Sequence[bool]
) -> GroupScore:
    ours, theirs = list(compress(right, chosen)), list(compress(base, chosen))
    answers = list(compress(result.answers, chosen))
    return GroupScore(
        len(ours),
        wilson(sum(ours), len(ours)),
        retention(ours, theirs),
        fmean(answer.visual_tokens for answer in answers),
        fmean(answer.kv_tokens for answer in answers),
        fmean(answer.prompt_tokens for answer in answers),
    )
