# SPDX-License-Identifier: Apache-2.0
"""Reads questions from a JSONL file, a log of chat requests or a folder of pictures; names bad lines."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_crop.comparing.metrics import Metric, why_no_answers
from vllm_crop.comparing.questions import Question, about, image_urls, last_text
from vllm_crop.crop_params import CropParams, InvalidCropError, parse_region
from vllm_crop.errors import CropError
from vllm_crop.measuring.question_files import (
    json_object,
    listed,
    numbered_lines,
    pictures_in,
    why_unreadable,
)

# Keys of a logged request that change what the model reads or may write. The others are the run's own.
PASSED_ON = (
    *("chat_template_kwargs", "documents", "media_io_kwargs", "mm_processor_kwargs"),
    *("response_format", "structured_outputs", "stop", "stop_token_ids"),
)
OUR_OWN = frozenset(
    {"model", "messages", "crop", "stream", "stream_options", "temperature", "max_tokens", "cache_salt"}
)


class DataError(CropError):
    """The questions cannot be asked; the message names each bad line and what is wrong with it."""


@dataclass(frozen=True)
class Data:
    """What was read.

    Attributes:
        without_image: conversations that were left out, as there is nothing to prune in them.
        not_sent: keys of logged requests that are not sent, and in how many requests they stood.
        available: questions before a sample was taken.
    """

    questions: tuple[Question, ...]
    without_image: int
    not_sent: dict[str, int]
    available: int


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_as_text)]


class _Line(BaseModel):
    """A question about a picture. What else a line says is its owner's business."""

    model_config = ConfigDict(strict=True)

    image: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)]


class _Labels(BaseModel):
    model_config = ConfigDict(strict=True)

    id: _Text | None = None
    custom_id: _Text | None = None
    answer: _Text | None = None
    answers: list[_Text] | None = None
    metric: Metric | None = None
    boxes: Any = None
    family: _Text | None = None
    group: _Text | None = None
    split: str | None = None

    def known(self, default: Metric) -> dict[str, Any]:
        """What is known of a question, as arguments of Question."""
        answers = (*(() if self.answer is None else (self.answer,)), *(self.answers or ()))
        metric = self.metric or default
        if (answers or self.metric) and (problem := why_no_answers(answers, metric)):
            raise DataError(f"answers: {problem}")
        boxes = () if not self.boxes else tuple(map(tuple, _boxes(self.boxes, "boxes")))
        return {
            "answers": answers,
            "metric": metric,
            "boxes": boxes,
            "family": self.family,
            "group": self.group,
        }


def read_data(
    path: Path,
    question: str | None,
    limit: int | None,
    seed: int | None,
    metric: Metric = "exact",
    split: str | None = None,
) -> Data:
    """Read everything, then take a part of it.

    Args:
        path: a JSONL file, or a folder of pictures.
        question: what to ask about every picture of a folder.
        limit: how many questions at most: the first ones, or with a `seed` a random sample.
        metric: of lines that name none.
        split: take only lines that say they are of it.

    Raises:
        DataError: there is nothing to ask, or lines are bad.
    """
    if path.is_dir():
        if split is not None:
            raise DataError(f"--split belongs to a file whose lines say theirs, and {path} is a folder")
        if question is None:
            raise DataError(f"{path} is a folder: say with --question what to ask about its pictures")
        data = _read_folder(path, question)
    elif question is not None:
        raise DataError(f"--question belongs to a folder of pictures, and {path} is none")
    else:
        data = _read_lines(path, metric, split)
    if not data.questions:
        of = f" of split {split!r}" if split else ""
        raise DataError(f"{path} has no question about a picture{of}")
    chosen = list(range(len(data.questions)))
    if limit is not None and limit < len(chosen):
        chosen = chosen[:limit] if seed is None else sorted(random.Random(seed).sample(chosen, limit))
    return Data(
        tuple(data.questions[index] for index in chosen), data.without_image, data.not_sent, data.available
    )


def _read_folder(folder: Path, question: str) -> Data:
    paths = pictures_in(folder)
    problems = [problem for path in paths if (problem := why_unreadable(path))]
    _refuse(problems, folder)
    questions = tuple(
        Question(str(path.relative_to(folder)), question, (), picture=path.absolute()) for path in paths
    )
    return Data(questions, 0, {}, len(questions))


def _read_lines(path: Path, metric: Metric, split: str | None) -> Data:
    questions: list[Question] = []
    problems: list[str] = []
    without_image, not_sent = 0, Counter[str]()
    for number, line in numbered_lines(path, DataError):
        try:
            value = json_object(line, DataError)
            if split is not None and value.get("split") != split:
                continue
            found, ignored = _read_line(value, f"line {number}", path.parent, metric)
        except DataError as error:
            problems.append(f"line {number}: {error}")
            continue
        if found is None:
            without_image += 1
        else:
            questions.append(found)
            not_sent.update(ignored)
    _refuse(problems, path)
    return Data(tuple(questions), without_image, dict(not_sent), len(questions))


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        raise DataError(f"{path} cannot be asked, {listed(problems)}")


def _read_line(
    value: dict[str, Any], place: str, folder: Path, metric: Metric
) -> tuple[Question | None, list[str]]:
    """The question of a line, None if it has no image; and keys of it that are not sent."""
    try:
        labels = _Labels.model_validate(value)
        name = labels.id or labels.custom_id or place
        if "messages" in value or "body" in value:
            body = value["body"] if "messages" not in value else value
            return _read_request(body, name, labels.known(metric), own_line=body is value)
        asked = _Line.model_validate(value)
    except ValidationError as error:
        raise DataError(_describe(error)) from None
    known = labels.known(metric)
    crop = {} if value.get("regions") is None else {"regions": [_boxes(value["regions"], "regions")]}
    if asked.image.startswith(("http://", "https://", "data:image/")):
        messages = tuple(about(asked.image, asked.question))
        return Question(name, asked.question, messages, crop=crop, **known), []
    if asked.image.startswith("data:") or "://" in asked.image:
        raise DataError("image: must be a path, or a URL that begins with http, https or data:image/")
    path = (folder / asked.image).absolute()
    if problem := why_unreadable(path):
        raise DataError(f"image: {problem}")
    return Question(name, asked.question, (), crop=crop, picture=path, **known), []


def _read_request(
    body: Any, name: str, known: Mapping[str, Any], own_line: bool
) -> tuple[Question | None, list[str]]:
    """A logged chat request."""
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise DataError("messages: must be a list of messages, as of a chat completion")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{index}]: must be an object with a role")
    if messages[-1]["role"] == "assistant":
        raise DataError("messages: end with the assistant's answer; leave it out, to ask for it")
    num_images = len(list(image_urls(messages)))
    if not num_images:
        return None, []
    try:
        params = CropParams.parse(body.get("crop") or {})
    except InvalidCropError as error:
        raise DataError(str(error)) from None
    if params.regions is not None and len(params.regions) != num_images:
        raise DataError(
            f"crop.regions: one entry per image needed, got {len(params.regions)} for {num_images}"
        )
    # Method and rate are what is compared.
    crop = body.get("crop") or {}
    own = {key: crop[key] for key in ("regions", "localize", "question") if key in crop}
    sent = {key: body[key] for key in PASSED_ON if key in body}
    # A line that is a request and its owner's record at once: what is no key of a request is the owner's.
    labels = set(_Labels.model_fields) if own_line else set()
    ignored = sorted(set(body) - set(PASSED_ON) - OUR_OWN - labels)
    return Question(name, last_text(messages), tuple(messages), crop=own, body=sent, **known), ignored


def _boxes(value: Any, key: str) -> list[list[float]]:
    try:
        region = parse_region(value)
    except ValueError as error:
        raise DataError(f"{key}: {error}") from None
    assert region is not None  # only None gives None
    return region.as_lists()


def _describe(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, one['loc']))}: {one['msg'][:1].lower()}{one['msg'][1:]}"
        for one in error.errors(include_url=False, include_input=False)
    )
