# SPDX-License-Identifier: Apache-2.0
"""Pictures and questions as tensors."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lab.tinyvqa import words
from lab.tinyvqa.drawing import draw_scene, thumbnail
from lab.tinyvqa.questions import Question, ask
from lab.tinyvqa.scenes import DIGITS, Cell, Scene, make_scene, training_seed
from lab.tinyvqa.training.fewer import choose_tokens
from lab.tinyvqa.training.labels import IGNORED, token_labels

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Task:
    """What a batch is made of.

    Attributes:
        locate: ask where, on thumbnails, instead of what, on full pictures.
        weights: how often each family is asked.
        questions: asked about one picture, or one view of it.
        views: rows of the batch that share a picture, each with questions of its own.
        pruning_rate: of the picture's visual tokens, see `fewer`.
    """

    side: int
    num_things: tuple[int, int]
    scenes: int
    questions: int
    weights: dict[str, float]
    locate: bool = False
    views: int = 1
    pruning_rate: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Visual tokens in a row of the picture."""
        return self.side if self.locate else 3 * self.side

    @property
    def length(self) -> int:
        """Most tokens of a question with its answer."""
        longest = 19 if "compare" in self.weights else 14
        return longest + 9 if self.locate else longest


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        images: `[scenes, height, width, 3]` bytes.
        questions: `[scenes, questions, length]` token ids, answers included.
        targets: the same shape: the token that must follow, `IGNORED` where it is not part of an answer.
        answering: `[scenes, questions]` index of the token before the answer.
        looks: `[stages, scenes, heads, questions, tokens]` whether an image token shows what to look at:
            first the things named, then those that decide; a head for the first thing and one for the second.
        places: `[scenes, questions, 2]` row and column of the cell to look at, `IGNORED` where it is not one.
        digits: `[scenes, tokens]` the digit an image token shows, `IGNORED` where it shows none.
        asked_digits: `[scenes, questions]` the digit asked for, `IGNORED` where none is.
        counting: `[scenes, questions]` whether things are to be counted.
        counted: `[scenes, questions, tokens]` the middle of each of these things.
        assignment, kept: see `choose_tokens`; empty where all tokens are left.
        families: per scene and question.
    """

    images: Tensor
    questions: Tensor
    targets: Tensor
    answering: Tensor
    looks: Tensor
    places: Tensor
    digits: Tensor
    asked_digits: Tensor
    counting: Tensor
    counted: Tensor
    assignment: Tensor
    kept: Tensor
    families: list[list[str]]


Tensors = TypeVar("Tensors", bound="DataclassInstance")


def moved(value: Tensors, device: torch.device) -> Tensors:
    """A dataclass with all of its tensors on another device."""
    fields = vars(value).items()
    return replace(value, **{name: part.to(device) for name, part in fields if isinstance(part, Tensor)})


def draw_all(scenes: Sequence[Scene], thumbnails: bool) -> Tensor:
    """`[scenes, height, width, 3]` bytes."""
    pictures = [draw_scene(scene) for scene in scenes]
    if thumbnails:
        pictures = [thumbnail(picture) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


class BatchMaker:
    """Makes batches; each seed makes its own, training seeds are even."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end, self.answer, self.vision_end = (
            tokenizer.convert_tokens_to_ids(token) for token in (words.END, words.ANSWER, words.VISION_END)
        )
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def make(self, task: Task, seed: int) -> Batch:
        """The batch of a seed."""
        chance = random.Random(seed)
        pictures = [make_scene(training_seed(chance), task.side, task.num_things) for _ in range(task.scenes)]
        scenes = [scene for scene in pictures for _ in range(task.views)]
        asked = [_ask_many(scene, task, chance) for scene in scenes]
        rows = [[self._row(question, task) for question in questions] for questions in asked]
        assignment = kept = torch.empty(0, dtype=torch.long)
        if task.pruning_rate:
            assignment, kept = choose_tokens(asked, task.side, task.num_tokens, task.pruning_rate, chance)
        return Batch(
            images=draw_all(pictures, thumbnails=task.locate),
            questions=torch.tensor([[row[0] for row in scene] for scene in rows]),
            targets=torch.tensor([[row[1] for row in scene] for scene in rows]),
            answering=torch.tensor([[row[2] for row in scene] for scene in rows]),
            looks=torch.stack([_looks(questions, task) for questions in asked], dim=1),
            places=torch.tensor([[_place(question, task) for question in questions] for questions in asked]),
            digits=_digits(scenes, task),
            asked_digits=torch.tensor([[_asked_digit(question, task) for question in row] for row in asked]),
            counting=torch.tensor([[_counts(question, task) for question in row] for row in asked]),
            counted=torch.stack([_middles(questions, task) for questions in asked]),
            assignment=assignment,
            kept=kept,
            families=[[question.family for question in questions] for questions in asked],
        )

    def _row(self, question: Question, task: Task) -> tuple[list[int], list[int], int]:
        text, answer = question.text, question.answer
        if task.locate:
            text, answer = words.LOCATE + text, question.location
        asked = [self.vision_end, *self.encode(text), self.answer]
        answered = [*self.encode(answer), self.end]
        padding = task.length - len(asked) - len(answered)
        assert padding >= 0, (text, answer)
        ids = asked + answered + [self.end] * padding
        before = len(asked) - 1
        targets = [IGNORED] * before + answered + [IGNORED] * (padding + 1)
        return ids, targets, before


def _ask_many(scene: Scene, task: Task, chance: random.Random) -> list[Question]:
    families, weights = list(task.weights), list(task.weights.values())
    questions: list[Question] = []
    while len(questions) < task.questions:
        question = ask(scene, chance.choices(families, weights)[0], chance)
        if question is not None:
            questions.append(question)
    return questions


def _stages(question: Question, task: Task) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
    """What to look at first and then."""
    if _counts(question, task) or (task.locate and not question.boxes):
        return (), ()
    return question.named, question.named if task.locate else question.decisive


def _place(question: Question, task: Task) -> Cell:
    cells = _stages(question, task)[1]
    return cells[0] if len(cells) == 1 else (IGNORED, IGNORED)


def _looks(questions: Sequence[Question], task: Task) -> Tensor:
    """`[2, 2, questions, tokens]`; a place is found by the things named alone, the whole by none."""
    side, scale = task.side, task.num_tokens // task.side
    looks = torch.zeros(2, 2, len(questions), side, side, dtype=torch.bool)
    for index, question in enumerate(questions):
        for stage, cells in enumerate(_stages(question, task)):
            first, second = (cells[:1], cells[1:]) if question.family == "compare" else (cells, cells)
            for head, seen in enumerate((first, second)):
                for row, col in seen:
                    looks[stage, head, index, row, col] = True
    return looks.repeat_interleave(scale, 3).repeat_interleave(scale, 4).flatten(3)


def _digits(scenes: Sequence[Scene], task: Task) -> Tensor:
    labels = [token_labels(scene, task.num_tokens)[2].flatten() for scene in scenes]
    digits = torch.from_numpy(np.stack(labels))
    return torch.full_like(digits, IGNORED) if task.locate else digits  # no thumbnail shows them


def _asked_digit(question: Question, task: Task) -> int:
    if question.family != "search" or task.locate:
        return IGNORED
    return next(DIGITS.index(letter) for letter in question.text if letter in DIGITS)


def _counts(question: Question, task: Task) -> bool:
    return question.family == "count" and not task.locate


def _middles(questions: Sequence[Question], task: Task) -> Tensor:
    """`[questions, tokens]`: one token of each thing to count, however many it covers."""
    scale = task.num_tokens // task.side
    middles = torch.zeros(len(questions), task.num_tokens, task.num_tokens)
    for index, question in enumerate(questions):
        if _counts(question, task):
            for row, col in question.named:
                middles[index, row * scale + scale // 2, col * scale + scale // 2] = 1
    return middles.flatten(1)
