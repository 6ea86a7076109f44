# SPDX-License-Identifier: Apache-2.0
"""Images whose tokens are several grids one after another, such as a view of the whole and tiles of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_crop.geometry import GridPart, Mask, Places, Region, TokenGrid


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
        """Say where every token is. Every grid is a group of its own, and so are its newlines."""
        places = np.empty((3, self.num_tokens), dtype=np.int32)
        for index, part in enumerate(self.parts):
            shape = (part.grid.rows, part.row_length)
            group, row, col = places[:, part.first : part.first + part.num_tokens].reshape(3, *shape)
            group[:, : part.grid.cols] = 2 * index
            group[:, part.grid.cols :] = 2 * index + 1
            row[:] = np.arange(part.grid.rows)[:, None]
            col[:] = np.arange(part.row_length)
            col[:, part.grid.cols :] = 0
        return Places(*places)

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
