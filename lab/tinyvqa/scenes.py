# SPDX-License-Identifier: Apache-2.0
"""Scenes: coloured shapes that carry a digit, each in a cell of its own. Plain data; `drawing` draws them.

A scene is a square of `side` x `side` cells. With the default of eight its cells are those that CROP's
localizer speaks of (paper section 3.1), and the smallest region that shows a thing is one of them.
"""

import random
from dataclasses import dataclass
from itertools import product

from vllm_crop.planning.geometry import GRID_CELLS

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")

Cell = tuple[int, int]  # row, column


@dataclass(frozen=True)
class Thing:
    """A coloured shape with a digit on it.

    Attributes:
        cell: row and column.
        offset: of its centre from that of the cell, x and y, in cells.
        size: its width, in cells.
    """

    colour: str
    shape: str
    digit: str
    cell: Cell
    offset: tuple[float, float] = (0.0, 0.0)
    size: float = 0.75

    @property
    def name(self) -> str:
        """As questions call it: "red circle". No two things of a scene share it."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things on a cluttered background, which `seed` draws."""

    things: tuple[Thing, ...]
    side: int
    seed: int

    def at(self, cell: Cell) -> Thing | None:
        """The thing in a cell."""
        return next((thing for thing in self.things if thing.cell == cell), None)


def make_scene(seed: int, side: int = GRID_CELLS, num_things: tuple[int, int] = (8, 12)) -> Scene:
    """The scene of a seed: the same for the same arguments.

    Args:
        seed: training takes even ones, the evaluation odd ones (`test_seed`).
        side: cells in a row and in a column.
        num_things: least and most, both included; no more than there are cells and names.
    """
    chance = random.Random(seed)
    names = list(product(COLOURS, SHAPES))
    chance.shuffle(names)
    if chance.random() < 0.3:  # else a colour is rarely shared by more than two
        common = chance.choice(COLOURS)
        names.sort(key=lambda name: name[0] != common or chance.random() < 0.3)
    count = min(chance.randint(*num_things), len(names), side * side)
    cells = _cells(chance, side, count)
    things = [_thing(chance, *name, cell) for name, cell in zip(names, cells, strict=False)]
    return Scene(tuple(things), side, seed)


def training_seed(chance: random.Random) -> int:
    """The seed of any scene that training may see."""
    return 2 * chance.randrange(2**40)


def test_seed(seed: int, index: int) -> int:
    """The seed of scene number `index` of the evaluation's test set `seed`."""
    return 2 * ((seed << 20) + index) + 1


def is_test_seed(seed: int) -> bool:
    """Whether training never sees the scene of this seed."""
    return seed % 2 == 1


def _cells(chance: random.Random, side: int, count: int) -> list[Cell]:
    """Every other one beside the one before, so that there is something to ask about neighbours."""
    free = set(product(range(side), range(side)))
    cells: list[Cell] = []
    while len(cells) < count:
        beside = [cell for cell in neighbours(cells[-1]).values() if cell in free] if len(cells) % 2 else []
        cell = chance.choice(beside or sorted(free))
        free.remove(cell)
        cells.append(cell)
    return cells


def neighbours(cell: Cell) -> dict[str, Cell]:
    """The four cells beside a cell, by where they are; they may lie outside the scene."""
    row, col = cell
    return {
        "left of": (row, col - 1),
        "right of": (row, col + 1),
        "above": (row - 1, col),
        "below": (row + 1, col),
    }


def _thing(chance: random.Random, colour: str, shape: str, cell: Cell) -> Thing:
    size = chance.uniform(0.66, 0.8)
    room = (0.96 - size) / 2  # it stays within its cell
    offset = (chance.uniform(-room, room), chance.uniform(-room, room))
    return Thing(colour, shape, chance.choice(DIGITS), cell, offset, size)
