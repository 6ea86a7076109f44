# SPDX-License-Identifier: Apache-2.0
"""How a condition asks a question: with which images, which words, and which `crop`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from lab.evaluation.conditions import CROP_METHODS, LOCATE, Condition
from lab.evaluation.controls import resized, thumbnail_and_crop
from lab.evaluation.questions import TestScene
from lab.tinyvqa import words
from lab.tinyvqa.drawing import thumbnail
from vllm_crop.families.qwen_vl import SmartResize
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import Region

ANSWER_STEPS = 4  # "yellow triangle" and the end take three
LOCATE_STEPS = 9  # two boxes of four digits and the end


@dataclass(frozen=True)
class Asked:
    """One question as it is sent.

    Attributes:
        crop: the request's field, None without the plugin.
        steps: most tokens to generate.
    """

    images: tuple[Image.Image, ...]
    text: str
    crop: dict[str, Any] | None = None
    steps: int = ANSWER_STEPS


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        visual_tokens: averaged over decoder layers.
        kv_tokens: of the whole prompt, averaged over decoder layers.
        confidence: the probability the model gave its words; known of the localizer's only.
        steps: tokens generated, the last one, which ends the answer, included.
    """

    text: str
    visual_tokens: float
    kv_tokens: float
    prompt_tokens: int
    confidence: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class SceneTask:
    """The questions of a scene, each with its region; None: to be served unpruned, or as the server finds."""

    scene: TestScene
    regions: tuple[Region | None, ...]


class Answerer(Protocol):
    """Something that answers conditions: the served engine, an endpoint, or plain transformers."""

    name: str

    def answer(self, condition: Condition, tasks: Sequence[SceneTask]) -> list[list[Answer]]:
        """Per scene and question. Raises BudgetError if the method cannot meet the condition's rate."""
        ...


def ask(condition: Condition, task: SceneTask, resize: SmartResize) -> list[Asked]:
    """Every question of a scene."""
    picture = task.scene.picture()
    texts = [question.text for question in task.scene.questions]
    if condition.method == LOCATE:
        small = thumbnail(picture)
        return [Asked((small,), words.LOCATE + text, steps=LOCATE_STEPS) for text in texts]
    if condition.method == "no-image":
        return [Asked((), text) for text in texts]
    if condition.pruning_rate is None:
        return [Asked((picture,), text) for text in texts]
    tokens = retained_count(resize.grid(*picture.size).num_tokens, condition.pruning_rate)
    if condition.method == "resize":
        small = resized(picture, tokens, resize)
        return [Asked((small,), text) for text in texts]
    pairs = list(zip(texts, task.regions, strict=True))
    if condition.method == "two-images":
        return [_with_crop(picture, text, region, tokens, resize) for text, region in pairs]
    assert condition.method in CROP_METHODS, f"{condition.method} cannot be served"
    return [Asked((picture,), text, _crop_field(condition, region)) for text, region in pairs]


def _with_crop(
    picture: Image.Image, text: str, region: Region | None, tokens: int, resize: SmartResize
) -> Asked:
    """Where there is nothing to crop, the picture itself."""
    images = [picture] if region is None else thumbnail_and_crop(picture, region, tokens, resize)
    return Asked(tuple(images), text)


def _crop_field(condition: Condition, region: Region | None) -> dict[str, Any]:
    regions = {"regions": [None if region is None else region.as_lists()]} if condition.sends_regions else {}
    return {**regions, "pruning_rate": condition.pruning_rate, "method": condition.method}
