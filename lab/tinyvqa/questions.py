# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, each with its answer and the smallest region it can be answered from.

`read`, `relation` and `compare` need one or two cells. `search` and `count` need the whole image: what is
asked for shows in no thumbnail, or could be anywhere.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from lab.tinyvqa.scenes import COLOURS, DIGITS, SHAPES, Cell, Scene, Thing, neighbours
from vllm_crop.localizers.dialects import WHOLE
from vllm_crop.planning.geometry import Box, Region

LOCAL = ("read", "relation", "compare")
GLOBAL = ("search", "count")
FAMILIES = LOCAL + GLOBAL
CellBox = tuple[int, int, int, int]  # first column, first row, last column, last row: both ends included


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        boxes: the minimal region, one box or two in the order of the question; none: the whole image.
        named: cells of the things the question speaks of, in its order.
        decisive: cells whose things decide the answer, in the order of the question.
    """

    family: str
    text: str
    answer: str
    boxes: tuple[CellBox, ...]
    named: tuple[Cell, ...]
    decisive: tuple[Cell, ...]

    @property
    def location(self) -> str:
        """What the localizer answers, in the dialect "cells"."""
        return "".join(str(number) for box in self.boxes for number in box) or WHOLE

    def region(self, side: int) -> Region:
        """The minimal region in fractions of the image."""
        return boxes_region(self.boxes, side)


def boxes_region(boxes: tuple[CellBox, ...], side: int) -> Region:
    """Boxes of cells as a region; no box is the whole image."""
    if not boxes:
        return Region.whole()
    scaled = [(x0 / side, y0 / side, (x1 + 1) / side, (y1 + 1) / side) for x0, y0, x1, y1 in boxes]
    return Region(tuple(Box(*box) for box in scaled))


def _around(*cells: Cell) -> CellBox:
    rows, cols = zip(*cells, strict=True)
    return min(cols), min(rows), max(cols), max(rows)


def _read(scene: Scene, chance: random.Random) -> Question:
    thing = chance.choice(scene.things)
    text = f"what number is on the {thing.name}?"
    return Question("read", text, thing.digit, (_around(thing.cell),), (thing.cell,), (thing.cell,))


def _relation(scene: Scene, chance: random.Random) -> Question | None:
    pairs = [
        (thing, where, other)
        for thing in scene.things
        for where, cell in neighbours(thing.cell).items()
        if (other := scene.at(cell)) is not None
    ]
    if not pairs:
        return None
    thing, where, other = chance.choice(pairs)
    text = f"what number is {where} the {thing.name}?"
    box = _around(thing.cell, other.cell)
    return Question("relation", text, other.digit, (box,), (thing.cell,), (other.cell,))


def _compare(scene: Scene, chance: random.Random) -> Question | None:
    things = [thing for thing in scene.things if thing.digit != scene.things[0].digit]
    if not things:
        return None
    first, second = chance.choice(things), scene.things[0]
    if chance.random() < 0.5:
        first, second = second, first
    larger = first if first.digit > second.digit else second
    text = f"which number is larger, on the {first.name} or the {second.name}?"
    cells = (first.cell, second.cell)
    return Question("compare", text, larger.name, (_around(cells[0]), _around(cells[1])), cells, cells)


def _search(scene: Scene, chance: random.Random) -> Question | None:
    digits = [thing.digit for thing in scene.things]
    found = [thing for thing in scene.things if digits.count(thing.digit) == 1]
    if not found:
        return None
    thing = chance.choice(found)
    kind, answer = chance.choice((("colour", thing.colour), ("shape", thing.shape)))
    text = f"what {kind} has the number {thing.digit}?"
    return Question("search", text, answer, (), (thing.cell,), (thing.cell,))


def _count(scene: Scene, chance: random.Random) -> Question:
    asked: tuple[str, Callable[[Thing], bool]]
    if chance.random() < 0.5:
        colour = chance.choice(COLOURS)
        asked = f"{colour} shapes", lambda thing: thing.colour == colour
    else:
        shape = chance.choice(SHAPES)
        asked = f"{_plural(shape)}", lambda thing: thing.shape == shape
    cells = tuple(thing.cell for thing in scene.things if asked[1](thing))
    return Question("count", f"how many {asked[0]}?", DIGITS[len(cells)], (), cells, cells)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


_MAKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "read": _read,
    "relation": _relation,
    "compare": _compare,
    "search": _search,
    "count": _count,
}


def ask(scene: Scene, family: str, chance: random.Random) -> Question | None:
    """A question of a family, None where the scene has no answer to any."""
    return _MAKERS[family](scene, chance)
