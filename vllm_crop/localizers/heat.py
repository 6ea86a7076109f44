# SPDX-License-Identifier: Apache-2.0
"""From a view of an image to the cells of a heat map, and from the map to a region."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_crop.heat.request import MAX_CELLS, NOWHERE, RING, NoHeatError
from vllm_crop.planning.geometry import Box, GridPart, ImageTokens, Region

FloatArray = NDArray[np.float64]
# From so many rows and columns on the outer ring is left out: attention that is about nothing gathers in the
# last column, and a thing that only the ring shows is rare. Of a small view the ring is half of it.
_RINGED = 12
_ROUNDING = 1e-9


@dataclass(frozen=True)
class HeatGrid:
    """A map's cells.

    Attributes:
        cells: per embedding of the view the cell it counts for, or NOWHERE, or RING.
    """

    rows: int
    cols: int
    cells: tuple[int, ...]

    @property
    def num_cells(self) -> int:
        """Cells of the map, those that no embedding counts for included."""
        return self.rows * self.cols


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where the model looked, `[rows, cols]` over what it was shown; the sum is 1."""

    values: FloatArray

    @classmethod
    def of(cls, grid: HeatGrid, heat: FloatArray) -> "HeatMap":
        """From `[num_cells]`.

        Raises:
            NoHeatError: all of it is zero.
        """
        total = float(heat.sum())
        if not total > 0:
            raise NoHeatError("no layer looks at the image")
        return cls((heat / total).reshape(grid.rows, grid.cols))

    def region(self, side: float, most: int, worth: float) -> Region:
        """Windows around the hottest cells.

        Args:
            side: of a window, as a fraction of what was shown.
            most: how many windows.
            worth: how hot a further window's hottest cell must be, as a fraction of the first one's.
        """
        return Region(tuple(self._windows(side, most, worth)))

    @property
    def peak(self) -> float:
        """How much of the heat the hottest cell has."""
        return float(self.values.max())

    @property
    def spread(self) -> float:
        """Over how much of the image it is spread: 0 if one cell has it all, 1 if all have the same.

        The entropy over that of a flat map.
        """
        shares = self.values[self.values > 0]
        most = math.log(self.values.size)
        return float(-(shares * np.log(shares)).sum() / most) if most else 0.0

    def warm(self, region: Region, above: float) -> Region | None:
        """The cells outside a region that are so many times hotter than the mean, neighbours as one box."""
        rows, cols = self.values.shape
        hot = self.values * self.values.size > above
        for box in region.boxes:
            hot &= np.outer(*_shares(box, rows, cols)) < 0.5
        boxes = []
        for row in range(rows):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], hot[row].astype(np.int8), [0]])))
            boxes += [
                Box(first / cols, row / rows, last / cols, (row + 1) / rows)
                for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
            ]
        return Region(tuple(boxes)) if boxes else None

    def within(self, region: Region) -> float:
        """How much of the heat a region holds beyond its share of the area: 0 if it is flat, at most 1."""
        inside = np.zeros(self.values.shape)
        for box in region.boxes:
            inside = np.maximum(inside, np.outer(*_shares(box, *self.values.shape)))
        area = float(inside.mean())
        held = float((inside * self.values).sum())
        return 1.0 if area >= 1 else min(1.0, max(0.0, (held - area) / (1 - area)))

    def _windows(self, side: float, most: int, worth: float) -> Iterator[Box]:
        rows, cols = self.values.shape
        left = self.values.copy()
        first = float(left.max())
        for number in range(most):
            row, col = divmod(int(left.argmax()), cols)
            if number and left[row, col] < worth * first:
                return
            x0, y0 = _around((col + 0.5) / cols, side), _around((row + 0.5) / rows, side)
            box = Box(x0, y0, x0 + side, y0 + side)
            yield box
            # A cell that the window shows a part of needs no window of its own.
            left[np.outer(*_shares(box, rows, cols)) > 0.2] = -1


def heat_grid(tokens: ImageTokens, assignment: NDArray[np.int32] | None = None) -> HeatGrid:
    """The cells of a view's map: those of its grid, or fewer where it has more than a map can.

    Args:
        tokens: of the view, unpruned.
        assignment: the embedding each token becomes part of; left out, each has its own.
    """
    # Of tiles that nobody sees the shape is another one's: their cells would be empty.
    shown = [part for part in tokens.parts if assignment is None or _is_used(part, assignment)]
    finest = max(shown, key=lambda part: part.grid.num_tokens).grid
    places = _places(tokens) if assignment is None else _means(_places(tokens), assignment)
    # As if the embeddings were a grid of the same shape: tokens may have been averaged.
    finer = min(1.0, (len(places) / finest.num_tokens) ** 0.5)
    view_rows, view_cols = finest.rows * finer, finest.cols * finer
    shrink = min(1.0, (MAX_CELLS / (view_rows * view_cols)) ** 0.5)
    rows = min(max(1, int(view_rows * shrink + _ROUNDING)), MAX_CELLS)
    cols = min(max(1, int(view_cols * shrink + _ROUNDING)), MAX_CELLS // rows)
    ringed = min(view_rows, view_cols) >= _RINGED
    shows = ~np.isnan(places[:, 0])
    x, y = np.where(shows, places.T, 0.0)
    cells = np.minimum((y * rows).astype(int), rows - 1) * cols + np.minimum((x * cols).astype(int), cols - 1)
    if ringed:
        edge_x, edge_y = 1 / view_cols, 1 / view_rows
        ring = (x < edge_x) | (x > 1 - edge_x) | (y < edge_y) | (y > 1 - edge_y)
        cells[ring] = RING
    cells[~shows] = NOWHERE
    return HeatGrid(rows, cols, tuple(cells.tolist()))


def _is_used(part: GridPart, assignment: NDArray[np.int32]) -> bool:
    return bool((assignment[part.first : part.first + part.num_tokens] >= 0).any())


def _places(tokens: ImageTokens) -> FloatArray:
    """The middle of every token in fractions of the view, `[num_tokens, 2]`; NaN for newlines."""
    places = np.full((tokens.num_tokens, 2), np.nan)
    for part in tokens.parts:
        row, col = np.divmod(np.arange(part.num_tokens), part.row_length)
        window, shown = part.window, col < part.grid.cols
        x = window.x0 + (col + 0.5) / max(1, part.grid.cols) * (window.x1 - window.x0)
        y = window.y0 + (row + 0.5) / part.grid.rows * (window.y1 - window.y0)
        of_part = slice(part.first, part.first + part.num_tokens)
        places[of_part] = np.where(shown[:, None], np.stack([x, y], axis=-1), np.nan)
    return places


def _means(places: FloatArray, assignment: NDArray[np.int32]) -> FloatArray:
    """The middle of every embedding, of the tokens it is made of."""
    counts = np.zeros(int(assignment.max()) + 1)
    sums = np.zeros((len(counts), 2))
    used = (assignment >= 0) & ~np.isnan(places[:, 0])
    np.add.at(counts, assignment[used], 1)
    np.add.at(sums, assignment[used], places[used])
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts[:, None])


def _around(middle: float, side: float) -> float:
    return min(max(0.0, middle - side / 2), 1.0 - side)


def _shares(box: Box, rows: int, cols: int) -> tuple[FloatArray, FloatArray]:
    """How much of each row and of each column a box covers."""
    return _covered(box.y0, box.y1, rows), _covered(box.x0, box.x1, cols)


def _covered(start: float, end: float, count: int) -> FloatArray:
    edges = np.arange(count + 1) / count
    overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.asarray(overlap.clip(min=0) * count)
