# SPDX-License-Identifier: Apache-2.0
"""How models say where something is: how to ask, which answers are legal, and how to read them.

"cells" is the language of the paper's localizer (section 3.1), "pixels" that of Qwen2.5-VL's grounding
("bbox_2d" in pixels of the image it sees), "thousandths" that of Qwen3-VL's (0 to 1000 of each side).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_crop.localizers.base import UnreadableAnswerError
from vllm_crop.planning.geometry import GRID_CELLS, Box, Region

DialectName = Literal["cells", "pixels", "thousandths"]
WHOLE = "whole"
MOST_BOXES = 16
_LONGEST_ANSWER = 4096  # characters; a remote localizer may say anything
_LARGEST = 1e6  # a whole number may have thousands of digits, and no float of it exists

Size = tuple[int, int]  # width and height of the image that was shown, pixels


@dataclass(frozen=True)
class Dialect:
    """One way to speak of places.

    Attributes:
        prompt: asks for the place; `{question}` stands for the question.
        regex: of every legal answer, for structured outputs.
        read: text of an answer and size of the image shown -> the region, None for the whole image.
        max_tokens: most tokens an answer takes.
    """

    prompt: str
    regex: str
    read: Callable[[str, Size], Region | None]
    max_tokens: int

    def ask(self, question: str) -> str:
        """The prompt about a question."""
        return self.prompt.replace("{question}", question)


def read_cells(text: str, size: Size = (1, 1)) -> Region | None:
    """Four digits for each box: first column, first row, last column, last row of 8x8 cells; or "whole".

    Raises:
        UnreadableAnswerError: it is neither.
    """
    said = text.strip()[:_LONGEST_ANSWER]
    if said == WHOLE:
        return None
    if not _CELLS.fullmatch(said):
        raise UnreadableAnswerError(f"no cells of an 8x8 grid: {said[:40]!r}")
    boxes: list[Box] = []
    for first in range(0, len(said), 4):
        x0, y0, x1, y1 = (int(digit) for digit in said[first : first + 4])
        boxes += Region.from_grid_cells(x0, y0, x1, y1).boxes
    return Region(tuple(boxes))


def read_pixels(text: str, size: Size) -> Region | None:
    """A JSON list of boxes `[x0, y0, x1, y1]`, bare or as `bbox_2d`, in pixels of the image shown.

    An empty list is the whole image.

    Raises:
        UnreadableAnswerError: no JSON, or no boxes within the image.
    """
    return _read_json(text, size)


def read_thousandths(text: str, size: Size = (1, 1)) -> Region | None:
    """The same with 0 to 1000 for each side."""
    return _read_json(text, (1000, 1000))


def _cells_regex() -> str:
    """Every legal answer, and no other: the last cell is never before the first."""
    last = GRID_CELLS - 1
    digits = range(GRID_CELLS)
    box = "|".join(f"{x}{y}[{x}-{last}][{y}-{last}]" for x in digits for y in digits)
    return f"({box})({box})?"


def _read_json(text: str, size: Size) -> Region | None:
    if len(text) > _LONGEST_ANSWER:
        raise UnreadableAnswerError(f"an answer of {len(text)} characters")
    try:
        said = json.loads(_FENCE.sub("", text))
    except (ValueError, RecursionError):  # ValueError also for a number of more than 4300 digits
        raise UnreadableAnswerError(f"no JSON: {text[:40]!r}") from None
    items = said if isinstance(said, list) and not _is_box(said) else [said]
    if len(items) > MOST_BOXES:
        raise UnreadableAnswerError(f"{len(items)} boxes, at most {MOST_BOXES} are allowed")
    boxes = tuple(_to_box(item.get("bbox_2d") if isinstance(item, dict) else item, size) for item in items)
    return Region(boxes) if boxes else None


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, int | float) and not isinstance(side, bool) for side in value)
        and all(abs(side) <= _LARGEST for side in value)  # neither NaN nor infinite either
    )


def _to_box(value: Any, size: Size) -> Box:
    if not _is_box(value):
        raise UnreadableAnswerError(f"no box [x0, y0, x1, y1]: {str(value)[:40]}")
    width, height = size
    # Models point a pixel or two past the edge; what lies far outside of the image is no place in it.
    x0, y0, x1, y1 = (
        min(1.0, max(0.0, side / extent)) for side, extent in zip(value, (width, height) * 2, strict=True)
    )
    if not (x0 < x1 and y0 < y1):
        raise UnreadableAnswerError(f"an empty box: {value}")
    return Box(x0, y0, x1, y1)


_CELLS = re.compile(_cells_regex())
_FENCE = re.compile(r"^\s*```(?:json)?|```\s*$")
_NUMBER = "[0-9]{1,4}"
_JSON_BOX = rf'\{{"bbox_2d": \[{_NUMBER}, {_NUMBER}, {_NUMBER}, {_NUMBER}\]\}}'
_JSON_REGEX = rf"\[({_JSON_BOX}(, {_JSON_BOX}){{0,3}})?\]"
_JSON_PROMPT = (
    'Which regions of the image must be seen to answer the question "{question}"? Output their bounding '
    'boxes as JSON, for example [{"bbox_2d": [10, 20, 110, 220]}]. Output [] if the whole image is needed.'
)

DIALECTS: dict[str, Dialect] = {
    "cells": Dialect(
        "Divide the image into 8 columns and 8 rows, both numbered from 0 to 7, from left to right and from "
        'top to bottom. Which cells must be seen to answer the question "{question}"? Answer with four '
        "digits: first column, first row, last column, last row, for example 2335. Answer with eight digits "
        f"for two places, or with the word {WHOLE} if the whole image is needed.",
        f"{WHOLE}|{_cells_regex()}",
        read_cells,
        12,
    ),
    "pixels": Dialect(_JSON_PROMPT, _JSON_REGEX, read_pixels, 160),
    "thousandths": Dialect(_JSON_PROMPT, _JSON_REGEX, read_thousandths, 160),
}


def dialect_with(name: DialectName, prompt: str | None) -> Dialect:
    """A dialect, in other words where they are given."""
    dialect = DIALECTS[name]
    return dialect if prompt is None else replace(dialect, prompt=prompt)
