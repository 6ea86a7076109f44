# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's answers beside those of our own evaluation."""

from math import isclose
from statistics import mean

from rich.table import Table

from lab.evaluation.published_answers import PublishedAnswers
from lab.lmms_eval.running import Answers
from lab.lmms_eval.ways import WAYS


def differences(theirs: list[Answers], ours: list[PublishedAnswers]) -> list[str]:
    """A line per answer that is another one, or per score."""
    lines = []
    for way, one, other in zip(WAYS, theirs, ours, strict=True):
        lines += [
            f"{way.name}, document {index}: lmms-eval has {a!r}, our evaluation {b!r}"
            for index, (a, b) in enumerate(zip(one.texts, other.texts, strict=True))
            if a != b
        ]
        if not isclose(one.score, mean(other.correct)):
            lines.append(f"{way.name}: lmms-eval's score is {one.score}, ours {mean(other.correct)}")
    return lines


def table(theirs: list[Answers], ours: list[PublishedAnswers]) -> Table:
    """A row per way."""
    shown = Table(box=None)
    for title in ("asked", "with lmms-eval"):
        shown.add_column(title, no_wrap=True)
    for title in ("questions", "score", "ours", "same", "as unpruned", "prompt tokens"):
        shown.add_column(title, no_wrap=True, justify="right")
    for way, one, other in zip(WAYS, theirs, ours, strict=True):
        shown.add_row(
            way.title,
            f"--model {way.model}",
            str(len(one.texts)),
            f"{one.score:.3f}",
            f"{mean(other.correct):.3f}",
            str(count_same(one.texts, other.texts)),
            str(count_same(one.texts, theirs[0].texts)),
            "" if one.prompt_tokens is None else f"{one.prompt_tokens:.1f}",
        )
    return shown


def count_same(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many answers are the same, word for word."""
    return sum(a == b for a, b in zip(one, other, strict=True))
