# SPDX-License-Identifier: Apache-2.0
"""Pictures with questions: generated, from a JSONL file of the user's, or a folder of pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_crop.calibrating.scenes import make_scene
from vllm_crop.config import describe_errors
from vllm_crop.crop_params import parse_region
from vllm_crop.errors import CropError
from vllm_crop.measuring.question_files import (
    json_object,
    listed,
    numbered_lines,
    pictures_in,
    why_unreadable,
)
from vllm_crop.planning.geometry import Region

FEWEST = 2  # pictures: one to choose layers, one to judge them


class CalibrationDataError(CropError):
    """Pictures or questions cannot be used; the message names each bad line and what is wrong with it."""


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        needs: what has to be seen to answer it: the whole picture for some questions; None if unknown.
    """

    text: str
    needs: Region | None

    @property
    def is_local(self) -> bool:
        """Whether it is known to be about a part of the picture."""
        return self.needs is not None and self.needs != Region.whole()


@dataclass(frozen=True)
class Pictured:
    """A picture with its questions; `open` gives it decoded, RGB."""

    name: str
    open: Callable[[], Image.Image]
    questions: tuple[Asked, ...]


class _Line(BaseModel):
    """A question. What else a line says is its owner's business."""

    model_config = ConfigDict(strict=True)

    image: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)]


def generated(pictures: int, questions: int, side: int, seed: int) -> list[Pictured]:
    """Scenes of ours, each with so many questions about a place and one about all of the picture."""
    scenes = [make_scene(seed * 100_000 + index, side) for index in range(pictures)]
    return [
        Pictured(
            f"scene {scene.seed}",
            scene.picture,
            tuple(
                Asked(one.text, Region.whole() if one.box is None else Region((one.box,)))
                for one in scene.questions(questions)
            ),
        )
        for scene in scenes
    ]


def read_pictures(path: Path, questions: Sequence[str], limit: int | None) -> list[Pictured]:
    """The user's own.

    Args:
        path: a JSONL file with a question a line, or a folder of pictures.
        questions: what to ask about every picture of a folder.
        limit: pictures at most, the first ones.

    Raises:
        CalibrationDataError: a line or a picture is bad, or there is too little to compare.
    """
    if path.is_dir():
        found = _read_folder(path, questions)
    elif questions:
        raise CalibrationDataError(f"--question belongs to a folder of pictures, and {path} is none")
    else:
        found = _read_lines(path)
    chosen = found[:limit]
    if len(chosen) < FEWEST:
        raise CalibrationDataError(
            f"{path} has {len(chosen)} pictures: at least {FEWEST} are needed, one to choose layers by and "
            "one to judge them by; 20 or more are better"
        )
    parts = {"first": chosen[::2], "second": chosen[1::2]}
    for which, part in parts.items():
        if all(len(picture.questions) < 2 for picture in part):
            raise CalibrationDataError(
                f"{path}: no picture of the {which} half (every other one) has two different questions. "
                "Layers are told apart by what changes with the question: ask two or more about each picture"
            )
    return chosen


def _read_folder(folder: Path, questions: Sequence[str]) -> list[Pictured]:
    if len(set(questions)) < 2:
        raise CalibrationDataError(
            f"{folder} is a folder: say with --question, two times or more, what to ask about its pictures"
        )
    paths = pictures_in(folder)
    _refuse(folder, [problem for path in paths if (problem := why_unreadable(path))])
    asked = tuple(Asked(text, None) for text in dict.fromkeys(questions))
    return [Pictured(str(path.relative_to(folder)), partial(_open, path), asked) for path in paths]


def _read_lines(path: Path) -> list[Pictured]:
    by_picture: dict[str, dict[str, Asked]] = {}
    problems = []
    for number, line in numbered_lines(path, CalibrationDataError):
        try:
            image, asked = _read_line(line)
            if image not in by_picture and (problem := why_unreadable(path.parent / image)):
                raise CalibrationDataError(problem)
        except CalibrationDataError as error:
            problems.append(f"line {number}: {error}")
            continue
        by_picture.setdefault(image, {})[asked.text] = asked
    _refuse(path, problems)
    return [
        Pictured(image, partial(_open, path.parent / image), tuple(questions.values()))
        for image, questions in by_picture.items()
    ]


def _read_line(line: str) -> tuple[str, Asked]:
    value = json_object(line, CalibrationDataError)
    try:
        said = _Line.model_validate(value)
    except ValidationError as error:
        raise CalibrationDataError(describe_errors(error, "", _Line).lstrip(".")) from None
    boxes = value.get("boxes")
    if boxes is None:
        return said.image, Asked(said.question, None)
    if boxes == []:
        return said.image, Asked(said.question, Region.whole())
    try:
        return said.image, Asked(said.question, parse_region(boxes))
    except ValueError as error:
        raise CalibrationDataError(f"boxes: {error}") from None


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise CalibrationDataError(f"{path} cannot be used, {listed(problems)}")


def halves(pictures: Sequence[Pictured]) -> Iterator[tuple[Pictured, bool]]:
    """Each with whether layers are chosen by it: every other one; the others judge."""
    for index, picture in enumerate(pictures):
        yield picture, index % 2 == 0
