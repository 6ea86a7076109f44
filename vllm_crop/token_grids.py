# SPDX-License-Identifier: Apache-2.0
"""Images whose tokens are several grids one after another, such as a view of the whole and tiles of it."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm_crop.geometry import GridPart, Place, Region, TokenGrid


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

    def tokens_in(self, region: Region) -> tuple[int, ...]:
        """Ascending indices of the tokens of all grids that the region touches, with their newlines."""
        return tuple(sorted(chain.from_iterable(part.tokens_in(region) for part in self.parts)))

    def place(self, token: int) -> Place:
        """Where a token is. Every grid is a group of its own, and so are its newlines."""
        index = max(index for index, part in enumerate(self.parts) if part.first <= token)
        part = self.parts[index]
        row, col = divmod(token - part.first, part.row_length)
        if col == part.grid.cols:
            return Place(2 * index + 1, row, 0)
        return Place(2 * index, row, col)

    def describe(self) -> str:
        """Such as "24 x 24 and 48 x 36 with newlines"."""
        return " and ".join(
            part.grid.describe() + (" with newlines" if part.newlines else "") for part in self.parts
        )

    def to_json(self) -> dict[str, Any]:
        """The grids as plans are printed with them."""
        return {
            "grids": [
                {**part.grid.to_json(), "window": part.window.as_list(), "newlines": part.newlines}
                for part in self.parts
            ]
        }


ImageTokens = TokenGrid | TokenGrids
