# SPDX-License-Identifier: Apache-2.0
"""What a compressor is trained on: questions about generated scenes, or about pictures of the user's."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lab.tinyvqa.drawing import draw_scene
from lab.tinyvqa.questions import ask
from lab.tinyvqa.scenes import make_scene, training_seed
from vllm_crop.config import describe_errors
from vllm_crop.crop_params import parse_region
from vllm_crop.errors import CropError
from vllm_crop.measuring.question_files import json_object, listed, numbered_lines, why_unreadable
from vllm_crop.planning.geometry import Region

PER_SCENE = 10
KEYS = {"image", "question", "answer", "boxes"}
# How often each family is asked. What needs the whole picture shows what a summary loses, and relations that
# things must stay where they are: a query that gathers them from far away is of no use there.
FAMILIES = {"read": 1.0, "relation": 3.0, "compare": 1.2, "search": 1.6, "count": 1.6}


class TrainingDataError(CropError):
    """Questions cannot be used; the message names each bad line and what is wrong with it."""


@dataclass(frozen=True)
class Item:
    """A question about a picture.

    Attributes:
        picture: names it; items of one picture share its features.
        open: gives it decoded, RGB.
        answer: None where nobody has said; for the recipe "match".
        region: what has to be seen to answer; the whole picture for some questions, None if unknown.
    """

    picture: str
    open: Callable[[], Image.Image]
    question: str
    answer: str | None
    region: Region | None


class _Line(BaseModel):
    """A question. What else a line says is its owner's business."""

    model_config = ConfigDict(strict=True)

    image: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)] | None = None


def scene_items(pictures: int, seed: int) -> list[Item]:
    """Questions about scenes of tinyvqa's training set, which no test has."""
    chance = random.Random(seed)
    items: list[Item] = []
    for _ in range(pictures):
        scene = make_scene(training_seed(chance))
        families = chance.choices(list(FAMILIES), list(FAMILIES.values()), k=PER_SCENE)
        asked = [question for family in families if (question := ask(scene, family, chance))]
        name, show = f"scene {scene.seed}", partial(draw_scene, scene)
        items += [Item(name, show, one.text, one.answer, one.region(scene.side)) for one in asked]
    return items


def read_items(path: Path, need_answers: bool) -> list[Item]:
    """The user's own: a JSONL file with `image`, `question`, and if known `answer` and `boxes` a line.

    Args:
        need_answers: whether a line without an answer is bad.

    Raises:
        TrainingDataError: naming every bad line.
    """
    items, problems = [], []
    for number, line in numbered_lines(path, TrainingDataError):
        try:
            items.append(_read_line(path.parent, line, need_answers))
        except TrainingDataError as error:
            problems.append(f"line {number}: {error}")
    if problems or not items:
        raise TrainingDataError(f"{path} cannot be used, {listed(problems) if problems else 'it is empty'}")
    return items


def _read_line(folder: Path, line: str, need_answers: bool) -> Item:
    value: dict[str, Any] = json_object(line, TrainingDataError)
    try:
        said = _Line.model_validate(value)
    except ValidationError as error:
        raise TrainingDataError(describe_errors(error, "", _Line).lstrip(".")) from None
    if need_answers and said.answer is None:
        raise TrainingDataError("has no `answer`: give one, or train with --recipe match, which needs none")
    for key in value.keys() - KEYS:
        if meant := get_close_matches(key, KEYS, n=1, cutoff=0.7):
            raise TrainingDataError(f"unknown key {key!r}, did you mean {meant[0]!r}?")
    if "regions" in value or "answers" in value:
        raise TrainingDataError("`boxes` and `answer` are read here, one list of boxes and one answer a line")
    path = folder / said.image
    if problem := why_unreadable(path):
        raise TrainingDataError(problem)
    return Item(said.image, partial(_open, path), said.question, said.answer, _region(value.get("boxes")))


def _region(boxes: Any) -> Region | None:
    if boxes is None:
        return None
    if boxes == []:
        return Region.whole()
    try:
        return parse_region(boxes)
    except ValueError as error:
        raise TrainingDataError(f"boxes: {error}") from None


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
