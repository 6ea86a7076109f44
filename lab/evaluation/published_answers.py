# SPDX-License-Identifier: Apache-2.0
"""Every answer of a result, small enough for git: from it a reader works out any interval again.

Compressed JSON, one object a line. The first line holds the questions in their order, each further line one
condition with its answers in that order:

    {"questions": [{"id": 0, "scene": 81, "family": "read", "question": "...", "answer": "7"}, ...]}
    {"cell": "plc-localizer-0.889", "engine": "vllm", "texts": ["7", ...], "correct": "110...",
     "visual_tokens": 64.0, "localizer_tokens": 64.0}

Counts are one number where all questions have the same, and else a list.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.evaluation.asking import Answer
from lab.evaluation.conditions import LOCATE
from lab.evaluation.questions import TestScene
from lab.evaluation.store import ConditionResult
from lab.evaluation.summary import right_answers

NAME = "answers.jsonl.gz"


@dataclass(frozen=True)
class PublishedQuestion:
    """One question; `id` is its place, `scene` the seed of its scene."""

    id: int
    scene: int
    family: str
    question: str
    answer: str


@dataclass(frozen=True)
class PublishedAnswers:
    """The answers of a condition, in the order of the questions."""

    cell: str
    engine: str
    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    visual_tokens: tuple[float, ...]
    localizer_tokens: tuple[float, ...]


def write_answers(path: Path, scenes: Sequence[TestScene], results: Sequence[ConditionResult]) -> None:
    """Write all answers; what is impossible has none."""
    pairs = ((scene.scene.seed, question) for scene in scenes for question in scene.questions)
    questions = [
        asdict(PublishedQuestion(index, seed, one.family, one.text, one.answer))
        for index, (seed, one) in enumerate(pairs)
    ]
    located = next((one.answers for one in results if one.condition.method == LOCATE), ())
    lines = [{"questions": questions}]
    lines += [_line(scenes, one, located) for one in results if not one.impossible]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a time inside, the same answers are the same file.
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_answers(path: Path) -> tuple[list[PublishedQuestion], list[PublishedAnswers]]:
    """Questions, and the answers of every condition."""
    first, *rest = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
    questions = [PublishedQuestion(**one) for one in first["questions"]]
    return questions, [_read(line, len(questions)) for line in rest]


def _line(scenes: Sequence[TestScene], result: ConditionResult, located: Sequence[Answer]) -> dict[str, Any]:
    spent = [one.visual_tokens for one in located] if result.condition.locates else []
    return {
        "cell": result.condition.slug,
        "engine": result.engine,
        "texts": [answer.text for answer in result.answers],
        "correct": "".join("01"[right] for right in _right(scenes, result)),
        "visual_tokens": _shortened([answer.visual_tokens for answer in result.answers]),
        "localizer_tokens": _shortened(spent or [0.0]),
    }


def _right(scenes: Sequence[TestScene], result: ConditionResult) -> list[bool]:
    """Of the localizer's own answers: whether they are the smallest region, word for word."""
    if result.condition.method != LOCATE:
        return right_answers(scenes, result)
    wanted = (question.location for scene in scenes for question in scene.questions)
    return [answer.text == one for answer, one in zip(result.answers, wanted, strict=True)]


def _shortened(counts: list[float]) -> float | list[float]:
    exact = [round(count, 3) for count in counts]
    return exact[0] if len(set(exact)) == 1 else exact


def _read(line: dict[str, Any], asked: int) -> PublishedAnswers:
    def every(counts: float | list[float]) -> tuple[float, ...]:
        return tuple(counts) if isinstance(counts, list) else (counts,) * asked

    return PublishedAnswers(
        line["cell"],
        line["engine"],
        tuple(line["texts"]),
        tuple(one == "1" for one in line["correct"]),
        every(line["visual_tokens"]),
        every(line["localizer_tokens"]),
    )
