# SPDX-License-Identifier: Apache-2.0
"""What is to be asked: a question about a picture, or a conversation of a log of chat requests."""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vllm_crop.comparing.metrics import Metric

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: its own `id`, else where it stands.
        text: what is asked, for people to read.
        answers: those that are right; empty where nobody has said.
        metric: how an answer is scored by them.
        boxes: where the answer stands, fractions of the picture; empty where nobody has said.
        family: its kind, for a row of its own.
        group: questions of a group are not independent of each other: of one picture, unless it is said.
        crop: its own part of the field `crop`: regions, or for which question the server finds them.
        body: further keys of the request, which change what the model reads or may write.
        messages: of the chat request, but for a picture that lies in a file.
        picture: that file.
    """

    name: str
    text: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    crop: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    metric: Metric = "exact"
    boxes: tuple[tuple[float, ...], ...] = ()
    family: str | None = None
    group: str | None = None

    @property
    def cluster(self) -> str:
        """What it shares with the questions that it is not independent of."""
        return self.group or "\n".join(self.picture_keys()) or self.name

    def to_send(self) -> list[Message]:
        """The messages of the request, the file's bytes in them as they are.

        Raises:
            OSError: the file cannot be read any more.
        """
        if self.picture is None:
            return list(self.messages)
        return about(file_url(self.picture), self.text)

    def picture_keys(self) -> tuple[str, ...]:
        """What tells its pictures from others, in the order of the prompt."""
        if self.picture is not None:
            return (str(self.picture),)
        return tuple(image_urls(self.messages))

    def pictures(self) -> list[Image.Image | None]:
        """Its pictures, as far as they are here: those that lie elsewhere are not fetched, and None."""
        if self.picture is not None:
            return [_open(self.picture.read_bytes())]
        return [_open(data) if (data := _bytes_of(url)) else None for url in image_urls(self.messages)]


def about(url: str, question: str) -> list[Message]:
    """The messages of a question about one picture."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def file_url(path: Path) -> str:
    """The file as a data URL: its own bytes, so that the server sees what other clients would send."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind = Image.MIME.get(image.format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_urls(messages: Sequence[Message]) -> Iterator[str]:
    """The URL of every image of a conversation, in order; empty for one that is sent by its name alone."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and "image_url" in part:
                image = part["image_url"]
                url = image.get("url") if isinstance(image, dict) else image
                yield url if isinstance(url, str) else ""


def last_text(messages: Sequence[Message]) -> str:
    """What the last message of the user says."""
    for message in reversed(messages):
        content = message.get("content")
        if message.get("role") != "user" or not content:
            continue
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else []
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        if said := " ".join(text for text in texts if isinstance(text, str)):
            return said
    return ""


def _bytes_of(url: str) -> bytes | None:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        return None
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        return None


def _open(data: bytes) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
