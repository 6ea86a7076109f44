# SPDX-License-Identifier: Apache-2.0
"""What the vision tower sees of a picture, and how large: the whole of it small, the region at full size.

    full size, 8 x 12 tokens        the view, 4 x 6           the crop: # the region, + its halo
    . . . . . . . . . . . .         . . . . . .
    . . . . . . . . . . . .         . . . . . .               + + + +
    . . # # . . . . . . . .         . . . . . .               + # # +
    . . # # . . . . . . . .         . . . . . .               + # # +
    . . . . . . . . . . . .                                   + + + +

A token of the region comes from the crop; it sees what is around the region through the halo, whose own
features are thrown away. All other tokens come from the view: each is a copy of the view's token that shows
its middle, so that the mean over a group of them weighs the view's tokens by their share of the group. Around
regions that have a rim, a piece of half the size lies between the two, or the crop reaches as far.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_crop.planning.geometry import Box, Region, TokenGrid

Span = tuple[int, int, int, int]  # row0, row1, col0, col1, half-open

MAX_CROPS = 16  # of one scale: more of them are joined where that costs least


@dataclass(frozen=True)
class Piece:
    """A window of the picture at one scale, which the vision tower encodes by itself.

    Attributes:
        scale: how many tokens the whole picture has at it.
        window: the tokens of it that are encoded.
        inner: those of them that are used; the others are halo.
    """

    scale: TokenGrid
    window: Span
    inner: Span

    @property
    def rows(self) -> int:
        """Rows of tokens that are encoded."""
        return self.window[1] - self.window[0]

    @property
    def cols(self) -> int:
        """Columns of tokens that are encoded."""
        return self.window[3] - self.window[2]

    @property
    def num_tokens(self) -> int:
        """Tokens that the vision tower makes of the piece."""
        return self.rows * self.cols

    @property
    def is_whole(self) -> bool:
        """Whether it shows all of the picture."""
        return self.window == (0, self.scale.rows, 0, self.scale.cols)

    def shows(self, span: Span) -> Box:
        """Tokens of its scale, in fractions of what the model sees of the picture."""
        row0, row1, col0, col1 = span
        rows, cols = self.scale.rows, self.scale.cols
        return Box(col0 / cols, row0 / rows, col1 / cols, row1 / rows)

    def as_numbers(self) -> tuple[int, ...]:
        """The piece as ten numbers, for a tensor; see `from_numbers`."""
        return (self.scale.rows, self.scale.cols, *self.window, *self.inner)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Piece":
        """The piece that `as_numbers` wrote."""
        rows, cols, w0, w1, w2, w3, i0, i1, i2, i3 = numbers
        return cls(TokenGrid(rows, cols), (w0, w1, w2, w3), (i0, i1, i2, i3))

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Piece":
        """The piece that `to_json` wrote."""
        return cls.from_numbers([*found["scale"], *found["window"], *found["inner"]])

    def to_json(self) -> dict[str, Any]:
        """The piece as plans are printed with it."""
        return {
            "scale": [self.scale.rows, self.scale.cols],
            "window": list(self.window),
            "inner": list(self.inner),
            "tokens": self.num_tokens,
        }


@dataclass(frozen=True)
class Sight:
    """How a server lets its vision tower see pictures.

    Attributes:
        view_tokens: about how many tokens all of a picture is seen in.
        halo, half_rims: as of FoveationRule.
    """

    view_tokens: int
    halo: int = 0
    half_rims: bool = False


@dataclass(frozen=True)
class FoveationRule:
    """How pieces are cut.

    Attributes:
        view: the scale at which the whole picture is seen.
        halo: tokens around a region that are encoded with it and thrown away.
        align: windows begin and end at multiples of so many tokens, or at the picture's border.
        half_rims: whether what is around a region may be seen at half the size, where that costs less.
    """

    view: TokenGrid
    halo: int
    align: int = 1
    half_rims: bool = True


def whole_piece(scale: TokenGrid) -> Piece:
    """All of the picture at one scale."""
    everything = (0, scale.rows, 0, scale.cols)
    return Piece(scale, everything, everything)


def tower_tokens(pieces: Iterable[Piece]) -> int:
    """Tokens that the vision tower makes of some pieces."""
    return sum(piece.num_tokens for piece in pieces)


def describe_pieces(pieces: Sequence[Piece]) -> str:
    """Such as "all of it as 16 x 16, 20 x 20 of 64 x 64"."""
    return ", ".join(
        f"all of it as {piece.scale.describe()}"
        if piece.is_whole
        else f"{piece.rows} x {piece.cols} of {piece.scale.describe()}"
        for piece in pieces
    )


def foveate(grid: TokenGrid, region: Region, around: Region | None, rule: FoveationRule) -> tuple[Piece, ...]:
    """Cut a picture into the pieces that the vision tower is to see.

    Args:
        grid: the picture at full size.
        region: in fractions of what the model sees.
        around: the region with its rim and what else is kept like it; None for a region without any.

    Returns:
        The view first, finer pieces after coarser ones. Empty where the whole picture at full size costs the
        vision tower no more.
    """
    view = whole_piece(rule.view)
    sharp = [grid.span(box) for box in region.boxes]
    wide = sharp if around is None else sharp + [grid.span(box) for box in around.boxes]
    half = TokenGrid(max(1, math.ceil(grid.rows / 2)), max(1, math.ceil(grid.cols / 2)))
    choices = [_crops(grid, wide, rule)]
    if rule.half_rims and wide is not sharp and half.num_tokens > rule.view.num_tokens:
        # Of a rim too little is kept for a halo to be worth its price.
        without = replace(rule, halo=0)
        between = _crops(half, [_scaled(span, grid, half) for span in wide], without)
        choices.append(between + _crops(grid, sharp, rule))
    pieces = min(choices, key=tower_tokens)
    if view.num_tokens + tower_tokens(pieces) >= grid.num_tokens:
        return ()
    return (view, *pieces)


def sources(grid: TokenGrid, pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """Where the features of each token come from: its index among the tokens of all pieces, `[num_tokens]`.

    Args:
        pieces: finer ones after coarser ones, the first of all the picture; as many may overlap as like.
    """
    found = np.full((grid.rows, grid.cols), -1, dtype=np.int64)
    first = 0
    for piece in pieces:
        (row0, _, col0, _), inner = piece.window, piece.inner
        row, rows = _middles(grid.rows, piece.scale.rows, inner[0], inner[1])
        col, cols = _middles(grid.cols, piece.scale.cols, inner[2], inner[3])
        found[np.ix_(rows, cols)] = first + (row - row0)[:, None] * piece.cols + (col - col0)
        first += piece.num_tokens
    assert (found >= 0).all(), "the first piece does not show all of the picture"
    return found.reshape(-1)


def _middles(full: int, scale: int, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Along one side, the places at another scale of the middles of tokens that lie in `start..end` there.

    Returns:
        The places, and the tokens at full size.
    """
    tokens = np.arange(full)
    places = (2 * tokens + 1) * scale // (2 * full)  # in whole numbers, so that no middle is torn
    inside = (places >= start) & (places < end)
    return places[inside], tokens[inside]


def _scaled(span: Span, grid: TokenGrid, to: TokenGrid) -> Span:
    """The tokens of another scale that tokens of this one touch."""
    row0, row1, col0, col1 = span
    return (
        row0 * to.rows // grid.rows,
        -(-row1 * to.rows // grid.rows),
        col0 * to.cols // grid.cols,
        -(-col1 * to.cols // grid.cols),
    )


def _crops(scale: TokenGrid, spans: Sequence[Span], rule: FoveationRule) -> list[Piece]:
    """Pieces for some places, joined where one costs no more than two, and where there are too many."""
    crops: list[Piece] = []
    for span in dict.fromkeys(spans):
        crop = _crop(scale, span, rule)
        while crops:
            cost, index, both = min(
                (_joined(crop, other, index, rule) for index, other in enumerate(crops)),
                key=lambda found: found[:2],
            )
            if cost > 0 and len(crops) < MAX_CROPS:
                break
            del crops[index]
            crop = both
        crops.append(crop)
    return crops


def _joined(crop: Piece, other: Piece, index: int, rule: FoveationRule) -> tuple[int, int, Piece]:
    """How many more tokens a crop of both has than they have themselves; the index as given; the crop."""
    (a0, a1, a2, a3), (b0, b1, b2, b3) = crop.inner, other.inner
    both = _crop(crop.scale, (min(a0, b0), max(a1, b1), min(a2, b2), max(a3, b3)), rule)
    return both.num_tokens - crop.num_tokens - other.num_tokens, index, both


def _crop(scale: TokenGrid, inner: Span, rule: FoveationRule) -> Piece:
    row0, row1, col0, col1 = inner
    rows = _widened(row0, row1, scale.rows, rule)
    cols = _widened(col0, col1, scale.cols, rule)
    return Piece(scale, (*rows, *cols), inner)


def _widened(start: int, end: int, length: int, rule: FoveationRule) -> tuple[int, int]:
    first = max(0, start - rule.halo) // rule.align * rule.align
    last = min(length, -(-(end + rule.halo) // rule.align) * rule.align)
    return first, last
