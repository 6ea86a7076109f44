# SPDX-License-Identifier: Apache-2.0
"""How right an answer is, from 0 to 1, as benchmarks count it. Pure: no server is asked, no model judges."""

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

from vllm_crop.comparing.answers import is_right, normalise

Metric = Literal["exact", "vqa", "anls", "relaxed", "iou"]
VQA_ANNOTATORS = 4  # at least: three that agree with each of them make an answer right
_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def score(answer: str, answers: Sequence[str], metric: Metric) -> float:
    """Score an answer.

    Args:
        answers: those that are right; with metric "vqa" what each annotator said; with "iou" boxes.
    """
    return _SCORES[metric](answer, answers)


def why_no_answers(answers: Sequence[str], metric: Metric) -> str | None:
    """What is wrong with right answers for a metric; None if nothing is."""
    if not answers:
        return f"metric {metric!r} needs answers"
    if metric == "vqa" and len(answers) < VQA_ANNOTATORS:
        return (
            f"metric 'vqa' counts annotators that agree: {VQA_ANNOTATORS} answers at least, mostly ten, and "
            f"not {len(answers)}"
        )
    if metric == "iou" and (bad := [one for one in answers if _box(one) is None]):
        return f"metric 'iou' needs boxes of four numbers, [x0, y0, x1, y1], not {bad[0]!r}"
    return None


def _exact(answer: str, answers: Sequence[str]) -> float:
    return float(is_right(answer, answers))


def _vqa(answer: str, answers: Sequence[str]) -> float:
    """Agreement with three of the other annotators, averaged over who is left out (VQA, Antol et al. 2015).

    The official script's normalisation also expands contractions; ours does not.
    """
    said, all_said = _with_digits(answer), [_with_digits(one) for one in answers]
    agree = sum(one == said for one in all_said)
    return fmean(min(1.0, (agree - (one == said)) / 3) for one in all_said)


def _with_digits(answer: str) -> str:
    return " ".join(_DIGITS.get(word, word) for word in normalise(answer).split())


def _anls(answer: str, answers: Sequence[str]) -> float:
    """One minus the edit distance per letter, 0 from a half on (ST-VQA, Biten et al. 2019; DocVQA)."""
    said = " ".join(answer.lower().split())
    return max(_likeness(said, " ".join(one.lower().split())) for one in answers)


def _likeness(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    distance = _edit_distance(one, other) / longest if longest else 0.0
    return 1 - distance if distance < 0.5 else 0.0


def _edit_distance(one: str, other: str) -> int:
    """Levenshtein's, row by row."""
    above = list(range(len(other) + 1))
    for row, here in enumerate(one, 1):
        left, line = row, [row]
        for col, there in enumerate(other, 1):
            left = min(above[col] + 1, left + 1, above[col - 1] + (here != there))
            line.append(left)
        above = line
    return above[-1]


def _relaxed(answer: str, answers: Sequence[str]) -> float:
    """A number within five percent, other answers normalised (ChartQA, Masry et al. 2022)."""
    return float(any(_is_close(answer, one) for one in answers))


def _is_close(answer: str, right: str) -> bool:
    said, wanted = _value(answer), _value(right)
    if said is None or not wanted:
        return is_right(answer, [right])
    return abs(said - wanted) <= 0.05 * abs(wanted)


def _value(answer: str) -> float | None:
    """The number an answer is; of "12 %" 0.12, without signs of thousands and of dollars."""
    text = answer.strip().rstrip(".").replace(",", "").removeprefix("$").strip()
    share = text.endswith("%")
    text = text.rstrip("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    return float(text) / (100 if share else 1)


def _iou(answer: str, answers: Sequence[str]) -> float:
    """Intersection over union of the first box that is said with the best of the right ones, 0 without."""
    said = _box(answer)
    return 0.0 if said is None else max(_overlap(said, box) for one in answers if (box := _box(one)))


def _box(text: str) -> tuple[float, ...] | None:
    """The first four numbers of a text, in whatever unit the model speaks of places."""
    numbers = tuple(float(number) for number in _NUMBER.findall(text)[:4])
    return numbers if len(numbers) == 4 else None


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


_SCORES: dict[Metric, Callable[[str, Sequence[str]], float]] = {
    "exact": _exact,
    "vqa": _vqa,
    "anls": _anls,
    "relaxed": _relaxed,
    "iou": _iou,
}
