# SPDX-License-Identifier: Apache-2.0
"""Random requests for the soak: what is asked, for how long, and what becomes of it; all from one seed."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from PIL import Image

from tests.cpu.conftest import Question
from tests.pictures import noise_image

LONGEST_ANSWER = 24
OUT_OF_VIEW = [0.0, 0.4, 0.05, 0.6]  # of a wide image, whose sides are cropped away

# When a request is aborted; "never" runs to its end, "finished" is aborted all the same, to no effect.
Fate = Literal["never", "unstarted", "prefilling", "decoding", "preempted", "finished"]
FATES: dict[Fate, int] = {
    "never": 56,
    "unstarted": 6,
    "prefilling": 10,
    "decoding": 12,
    "preempted": 10,
    "finished": 6,
}

TEXTS = (
    "USER: {images}What is the time, and where?\nASSISTANT:",
    "USER: {images}Who?\nASSISTANT:",
    "{images}What is the colour of the third door on the left hand side?\nASSISTANT:",
)
IMAGE_LAST = "USER: What?\n{images}"
TEXTS_ONLY = (
    "USER: What is the time?\nASSISTANT:",
    "USER: What is the time in the town that lies north of the river?\nASSISTANT:",
    "USER: " + "and again, " * 15 + "what?\nASSISTANT:",
)
SIZES = ((336, 336), (500, 400), (300, 420), (800, 400), (672, 336))
# Rates of "ilp" are bound by the layers before the first eviction, which see the whole image.
RATES = {"ilp": (0.5, 2 / 3, 0.7), "plc+ilp": (0.5, 0.7, 0.85), "plc": (0.5, 0.778, 0.9)}


@dataclass(frozen=True)
class SoakRequest:
    """One request to come."""

    question: Question
    num_tokens: int
    fate: Fate


class Load:
    """Requests drawn from a catalogue of questions about few images."""

    def __init__(self, rng: Random, num_questions: int, num_images: int = 12) -> None:
        self.rng = rng
        images = [noise_image(900 + index, *rng.choice(SIZES)) for index in range(num_images)]
        self.catalogue = [Question(text=text) for text in TEXTS_ONLY]
        while len(self.catalogue) < num_questions:
            question = _question(rng, images)
            # The other question shares its prefix, mask and all.
            self.catalogue += [question, replace(question, text=rng.choice(TEXTS), after_image="\n")]
        self.recent: deque[Question] = deque(maxlen=6)

    def next(self) -> SoakRequest:
        """Half of the time a question asked a moment ago, so that its blocks may still be cached."""
        again = self.recent and self.rng.random() < 0.5
        question = self.rng.choice(self.recent if again else self.catalogue)
        self.recent.append(question)
        (fate,) = self.rng.choices(list(FATES), weights=list(FATES.values()))
        return SoakRequest(question, self.rng.randint(1, LONGEST_ANSWER), fate)


def _question(rng: Random, images: Sequence[Image.Image]) -> Question:
    shown = tuple(rng.sample(images, rng.choice((1, 1, 1, 1, 2))))
    method = rng.choices(("ilp", "plc+ilp", "plc", "off"), weights=(10, 10, 4, 1))[0]
    crop: dict[str, Any] = {"regions": [_region(rng) for _ in shown], "method": method}
    if method != "off":
        crop["pruning_rate"] = rng.choice(RATES[method])
    if rng.random() < 0.1:
        return Question(shown, crop, IMAGE_LAST, after_image="")
    return Question(shown, crop, rng.choice(TEXTS))


def _region(rng: Random) -> list[Any] | None:
    kind = rng.choices(("one", "two", "none", "out of view"), weights=(12, 4, 1, 1))[0]
    if kind == "none":
        return None
    if kind == "out of view":
        return OUT_OF_VIEW
    return _box(rng) if kind == "one" else [_box(rng), _box(rng)]


def _box(rng: Random) -> list[float]:
    left, top = rng.uniform(0.15, 0.7), rng.uniform(0.15, 0.7)
    return [left, top, left + rng.uniform(0.05, 0.25), top + rng.uniform(0.05, 0.25)]
