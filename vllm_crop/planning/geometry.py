# SPDX-License-Identifier: Apache-2.0
"""Boxes, regions and token grids: where things are in an image, in numbers.

Coordinates are fractions of the image, x to the right and y down, half-open: [x0, x1) by [y0, y1).
"""

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]

GRID_CELLS = 8  # CROP's localizer speaks of an 8x8 grid (paper section 3.1)
_EDGE_TOLERANCE = 1e-6  # of a token: 1/3 of 24 columns is column 8, not 7.999


@dataclass(frozen=True)
class Box:
    """One axis-aligned box, fractions of the image with `x0 < x1` and `y0 < y1`."""

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise ValueError(f"box must have x0 < x1 and y0 < y1, got {self.as_list()}")

    def as_list(self) -> list[float]:
        """The four coordinates as `[x0, y0, x1, y1]`."""
        return [self.x0, self.y0, self.x1, self.y1]

    def widened(self, by: float) -> "Box":
        """The box with a margin on every side, as far as the image goes."""
        return Box(
            max(0.0, self.x0 - by), max(0.0, self.y0 - by), min(1.0, self.x1 + by), min(1.0, self.y1 + by)
        )


@dataclass(frozen=True)
class Region:
    """The part of an image a question is about: the union of one or more boxes."""

    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if not self.boxes:
            raise ValueError("a region needs at least one box")

    @classmethod
    def whole(cls) -> "Region":
        """The whole image."""
        return cls((Box(0.0, 0.0, 1.0, 1.0),))

    @classmethod
    def from_grid_cells(cls, x0: int, y0: int, x1: int, y1: int, cells: int = GRID_CELLS) -> "Region":
        """A rectangle of cells, `0..cells-1` with both ends included, as the paper's localizer names it.

        Raises:
            ValueError: a cell lies outside the grid or the rectangle is empty.
        """
        if not (0 <= x0 <= x1 < cells and 0 <= y0 <= y1 < cells):
            raise ValueError(f"cells must be 0..{cells - 1}, first <= last, got {[x0, y0, x1, y1]}")
        return cls((Box(x0 / cells, y0 / cells, (x1 + 1) / cells, (y1 + 1) / cells),))

    def to_grid_cells(self, cells: int = GRID_CELLS) -> tuple[int, int, int, int]:
        """The smallest rectangle of cells that covers the region, both ends included."""
        grid = TokenGrid(cells, cells)
        spans = [grid.span(box) for box in self.boxes]
        rows = [row for (row0, row1, _, _) in spans for row in (row0, row1)]
        cols = [col for (_, _, col0, col1) in spans for col in (col0, col1)]
        return min(cols), min(rows), max(cols) - 1, max(rows) - 1

    def widened(self, by: float) -> "Region":
        """Every box with a margin."""
        return Region(tuple(box.widened(by) for box in self.boxes))

    def as_lists(self) -> list[list[float]]:
        """The boxes as lists, for JSON."""
        return [box.as_list() for box in self.boxes]


@dataclass(frozen=True)
class TokenGrid:
    """The visual tokens of one image after spatial merge, `rows` x `cols`, numbered row by row."""

    rows: int
    cols: int

    @property
    def num_tokens(self) -> int:
        """How many visual tokens the image costs unpruned."""
        return self.rows * self.cols

    def span(self, box: Box) -> tuple[int, int, int, int]:
        """The tokens a box touches: `(row0, row1, col0, col1)`, half-open, never empty."""
        row0, row1 = _span(box.y0, box.y1, self.rows)
        col0, col1 = _span(box.x0, box.x1, self.cols)
        return row0, row1, col0, col1

    def mask(self, region: Region) -> Mask:
        """Mark the tokens whose area the region touches, `[num_tokens]`."""
        touched = np.zeros((self.rows, self.cols), dtype=bool)
        for box in region.boxes:
            row0, row1, col0, col1 = self.span(box)
            touched[row0:row1, col0:col1] = True
        return touched.reshape(-1)

    def places(self) -> "Places":
        """Say where every token is."""
        tokens = np.arange(self.num_tokens, dtype=np.int32)
        rows = tokens // self.cols
        return Places(np.zeros_like(rows), rows, tokens - rows * np.int32(self.cols))

    @property
    def parts(self) -> "tuple[GridPart, ...]":
        """The grid as the only one of its image; see vllm_crop/planning/geometry.py for several."""
        return (GridPart(self),)

    def describe(self) -> str:
        """Such as "24 x 24"."""
        return f"{self.rows} x {self.cols}"

    def to_json(self) -> dict[str, Any]:
        """The grid as plans are printed with it."""
        return {"grid": [self.rows, self.cols]}


class Places(NamedTuple):
    """Where tokens are, each array `[num_tokens]`, int32.

    Attributes:
        part: only tokens of one part are neighbours and averaged with each other: a grid, or its newlines.
        row, col: within the part.
    """

    part: NDArray[np.int32]
    row: NDArray[np.int32]
    col: NDArray[np.int32]


@dataclass(frozen=True)
class GridPart:
    """A grid among the tokens of an image.

    Attributes:
        grid: its tokens that show something.
        window: what they show, in fractions of what the model sees.
        first: the index of its first token among all of the image.
        newlines: after each row comes one more token, which shows nothing.
    """

    grid: TokenGrid
    window: Box = Box(0.0, 0.0, 1.0, 1.0)
    first: int = 0
    newlines: bool = False

    @property
    def row_length(self) -> int:
        """Tokens of a row, with its newline."""
        return self.grid.cols + self.newlines

    @property
    def num_tokens(self) -> int:
        """Tokens of the image that belong to this grid."""
        return self.grid.rows * self.row_length

    def token(self, row: int, col: int) -> int:
        """The index among the image's tokens; a row's newline is its last column."""
        return self.first + row * self.row_length + col

    def cell(self, token: int) -> tuple[int, int] | None:
        """Row and column of an image's token; None for newlines and tokens of other grids."""
        row, col = divmod(token - self.first, self.row_length)
        return (row, col) if 0 <= row < self.grid.rows and col < self.grid.cols else None

    def mask(self, region: Region) -> Mask:
        """Mark this grid's tokens that the region touches, and the newlines of their rows, `[num_tokens]`."""
        touched = np.zeros((self.grid.rows, self.row_length), dtype=bool)
        seen = ImageView(self.window).project(region)
        if seen is not None and self.grid.num_tokens:
            for box in seen.boxes:
                row0, row1, col0, col1 = self.grid.span(box)
                touched[row0:row1, col0:col1] = True
                touched[row0:row1, self.grid.cols :] = True
        return touched.reshape(-1)


@dataclass(frozen=True)
class ImageView:
    """What the model sees of an image: a window in fractions of the image as it was sent.

    The window may reach beyond the image (padding) or leave parts out (centre crop).
    """

    window: Box

    def project(self, region: Region) -> Region | None:
        """The region in fractions of the view; None when the model sees nothing of it."""
        boxes = tuple(projected for box in region.boxes if (projected := self._project_box(box)))
        return Region(boxes) if boxes else None

    def unproject(self, region: Region) -> Region | None:
        """The region in fractions of the image, from one in fractions of the view; None outside of it."""
        width, height = self.window.x1 - self.window.x0, self.window.y1 - self.window.y0
        boxes = []
        for box in region.boxes:
            x0, x1 = (min(1.0, max(0.0, self.window.x0 + x * width)) for x in (box.x0, box.x1))
            y0, y1 = (min(1.0, max(0.0, self.window.y0 + y * height)) for y in (box.y0, box.y1))
            if x0 < x1 and y0 < y1:
                boxes.append(Box(x0, y0, x1, y1))
        return Region(tuple(boxes)) if boxes else None

    def within(self, window: Box) -> "ImageView":
        """A part of the view, `window` in fractions of it, as a view of the image."""
        left, top = self.window.x0, self.window.y0
        width, height = self.window.x1 - left, self.window.y1 - top
        return ImageView(
            Box(
                left + window.x0 * width,
                top + window.y0 * height,
                left + window.x1 * width,
                top + window.y1 * height,
            )
        )

    def _project_box(self, box: Box) -> Box | None:
        window = self.window
        width, height = window.x1 - window.x0, window.y1 - window.y0
        x0 = max(0.0, (box.x0 - window.x0) / width)
        x1 = min(1.0, (box.x1 - window.x0) / width)
        y0 = max(0.0, (box.y0 - window.y0) / height)
        y1 = min(1.0, (box.y1 - window.y0) / height)
        return Box(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _span(start: float, end: float, count: int) -> tuple[int, int]:
    first = min(max(math.floor(start * count + _EDGE_TOLERANCE), 0), count - 1)
    last = min(max(math.ceil(end * count - _EDGE_TOLERANCE), first + 1), count)
    return first, last


@dataclass(frozen=True)
class TokenGrids:
    """The visual tokens of one image in several grids, numbered through them in the order of the prompt.

    Attributes:
        parts: at least one; each begins where the one before it ends.
    """

    parts: tuple[GridPart, ...]

    def __post_init__(self) -> None:
        expected = 0
        for part in self.parts:
            if part.first != expected:
                raise ValueError(f"a grid begins at token {part.first}, the one before it ends at {expected}")
            expected += part.num_tokens

    @property
    def num_tokens(self) -> int:
        """How many visual tokens the image costs unpruned, newlines included."""
        return sum(part.num_tokens for part in self.parts)

    def mask(self, region: Region) -> Mask:
        """Mark the tokens of all grids that the region touches, with their newlines, `[num_tokens]`."""
        return np.concatenate([part.mask(region) for part in self.parts])

    def places(self) -> Places:
        """Say where every token is. Every grid is a part of its own, and so are its newlines."""
        places = np.empty((3, self.num_tokens), dtype=np.int32)
        for index, part in enumerate(self.parts):
            shape = (part.grid.rows, part.row_length)
            part_of, row, col = places[:, part.first : part.first + part.num_tokens].reshape(3, *shape)
            part_of[:, : part.grid.cols] = 2 * index
            part_of[:, part.grid.cols :] = 2 * index + 1
            row[:] = np.arange(part.grid.rows)[:, None]
            col[:] = np.arange(part.row_length)
            col[:, part.grid.cols :] = 0
        return Places(*places)

    def describe(self) -> str:
        """Such as "24 x 24 and 48 x 36 with newlines", or "13 times 16 x 16"."""
        each = (part.grid.describe() + (" with newlines" if part.newlines else "") for part in self.parts)
        alike = ((said, len(list(group))) for said, group in groupby(each))
        return " and ".join(said if count == 1 else f"{count} times {said}" for said, count in alike)

    def to_json(self) -> dict[str, Any]:
        """The grids as plans are printed with them."""
        return {
            "grids": [
                {**part.grid.to_json(), "window": part.window.as_list(), "newlines": part.newlines}
                for part in self.parts
            ]
        }


ImageTokens = TokenGrid | TokenGrids
