# SPDX-License-Identifier: Apache-2.0
"""Pages and questions as tensors."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from lab.pages.browser import Page
from lab.pages.checkpoint import WINDOW
from lab.pages.store import read_pages
from lab.pages.training.lessons import teach, words_of
from lab.pages.training.letters import IGNORED, letter_labels
from lab.pages.training.names import name_labels
from lab.pages.training.phases import Phase
from lab.tinyvqa.checkpoint import TOKEN
from lab.tinyvqa.words import ANSWER, END, VISION_END

LENGTH = 32  # tokens of a question with its answer; longer ones are not asked
_TRIES = 200
_MOST_STEPS = 10**9

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Sample:
    """A page in memory.

    Attributes:
        number: of the page among all.
        png: the picture's file: decoded, thousands would not fit.
    """

    number: int
    page: Page
    png: bytes

    @cached_property
    def words(self) -> list[str]:
        """The page's words."""
        return words_of(self.page.letters)


@dataclass(frozen=True)
class Batch:
    """One step's input, pages of one size.

    Attributes:
        numbers: of the pages.
        images: `[pages, height, width, 3]` bytes.
        letters: `[pages, tokens, SLOTS]`, see `letter_labels`.
        names: `[pages, tokens, len(NAMES), MOST_IDS]`, see `name_labels`.
        questions: `[pages, questions, LENGTH]` token ids, answers included.
        targets: the same shape: the token that must follow, IGNORED where it is not part of an answer.
        families: per page and question.
    """

    numbers: list[int]
    images: Tensor
    letters: Tensor
    names: Tensor
    questions: Tensor
    targets: Tensor
    families: list[list[str]]


class Pages:
    """The pages that are trained on, by the size of their pictures."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.by_size: dict[Size, list[Sample]] = defaultdict(list)
        for number, page in enumerate(track(read_pages(folder), description="reading pages")):
            path = Path(str(page.picture.filename))  # type: ignore[attr-defined]
            page.picture.close()
            self.by_size[page.look.size].append(Sample(number, page, path.read_bytes()))
        self.tokenizer = tokenizer
        self.end, self.answer, self.vision_end = (
            tokenizer.convert_tokens_to_ids(token) for token in (END, ANSWER, VISION_END)
        )
        self._known: dict[str, list[int]] = {}

    def batch(
        self, seed: int, tokens: int, questions: int, weights: Mapping[str, float], scales: Sequence[float]
    ) -> Batch:
        """The batch of a seed.

        Args:
            tokens: about so many visual tokens in all.
            questions: of each page.
            weights: how often each family is asked.
            scales: of pictures, one of which is taken.
        """
        chance = random.Random(seed)
        size = chance.choices(list(self.by_size), [len(pages) for pages in self.by_size.values()])[0]
        scaled = _scaled(size, chance.choice(scales))
        count = max(1, tokens // (scaled[0] * scaled[1] // TOKEN**2))
        samples = chance.sample(self.by_size[size], min(count, len(self.by_size[size])))
        rows = [self._rows(sample, questions, weights, chance) for sample in samples]
        letters = [_letters(sample.page, size, scaled) for sample in samples]
        names = [self._names(sample.page, size, scaled) for sample in samples]
        return Batch(
            numbers=[sample.number for sample in samples],
            images=torch.from_numpy(np.stack([_decoded(sample.png, scaled) for sample in samples])),
            letters=torch.from_numpy(np.stack(letters)),
            names=torch.from_numpy(np.stack(names)),
            questions=torch.tensor([[row[0] for row in page] for page in rows]),
            targets=torch.tensor([[row[1] for row in page] for page in rows]),
            families=[[row[2] for row in page] for page in rows],
        )

    def _names(self, page: Page, size: Size, scaled: Size) -> NDArray[np.int64]:
        rows, cols = scaled[1] // TOKEN, scaled[0] // TOKEN
        labels = name_labels(page, rows, cols, (scaled[0] / size[0], scaled[1] / size[1]), self._encode)
        return labels.reshape(rows * cols, *labels.shape[2:])

    def _rows(
        self, sample: Sample, questions: int, weights: Mapping[str, float], chance: random.Random
    ) -> list[tuple[list[int], list[int], str]]:
        rows: list[tuple[list[int], list[int], str]] = []
        for _ in range(_TRIES):
            if len(rows) == questions:
                break
            family = chance.choices(list(weights), list(weights.values()))[0]
            lesson = teach(sample.page, sample.words, family, chance)
            row = None if lesson is None else self._row(*lesson)
            if row is not None:
                rows.append((*row, family))
        empty = [self.end] * LENGTH, [IGNORED] * LENGTH, "none"
        return rows + [empty] * (questions - len(rows))

    def _row(self, text: str, answer: str) -> tuple[list[int], list[int]] | None:
        asked = [self.vision_end, *self._encode(text), self.answer]
        answered = [*self._encode(answer), self.end]
        padding = LENGTH - len(asked) - len(answered)
        if padding < 0:
            return None
        targets = [IGNORED] * (len(asked) - 1) + answered + [IGNORED] * (padding + 1)
        return asked + answered + [self.end] * padding, targets

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]


@dataclass(frozen=True)
class Steps:
    """The batches of a phase by their step; each has a seed of its own."""

    pages: Pages
    phase: Phase
    seed: int
    batch_scale: float

    def __getitem__(self, step: int) -> Batch:
        phase = self.phase
        tokens = int(phase.tokens * self.batch_scale)
        return self.pages.batch(self.seed + step, tokens, phase.questions, phase.weights, phase.scales)

    def ahead(self, first: int, workers: int) -> Iterator[Batch]:
        """All batches from a step on, made by other processes while earlier ones are trained on."""
        steps = range(first, first + _MOST_STEPS)
        if not workers:
            return map(self.__getitem__, steps)
        loader: DataLoader[Batch] = DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4,
            multiprocessing_context="fork",  # pages are in memory, and stay the parent's
        )
        return iter(loader)


def _scaled(size: Size, scale: float) -> Size:
    """Whole windows of the vision tower, one at least."""
    width, height = (max(WINDOW, round(side * scale / WINDOW) * WINDOW) for side in size)
    return width, height


def _decoded(png: bytes, size: Size) -> NDArray[np.uint8]:
    import io

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))


def _letters(page: Page, size: Size, scaled: Size) -> NDArray[np.int64]:
    rows, cols = scaled[1] // TOKEN, scaled[0] // TOKEN
    labels = letter_labels(page.letters, rows, cols, (scaled[0] / size[0], scaled[1] / size[1]))
    return labels.reshape(rows * cols, -1)
