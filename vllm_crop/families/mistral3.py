# SPDX-License-Identifier: Apache-2.0
"""Mistral 3: the whole image in as many tokens as its size asks for, a break after each row but the last.

Follows get_resize_output_image_size of transformers' PixtralImageProcessor. After the last row stands another
token, which ends the image and is no part of it here: however an image is pruned, it stays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vllm_crop.errors import UnsupportedImageError, UnsupportedModelError
from vllm_crop.families.plain import PlainText, SeenWhole
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.planning.geometry import Box, GridPart, ImageTokens, ImageView, TokenGrid, TokenGrids


@dataclass(frozen=True)
class Mistral3Geometry(PlainText, SeenWhole):
    """The geometry of a PixtralImageProcessor.

    Attributes:
        token_side: pixels of a visual token's side after the resize.
        longest_edge: larger images are reduced to it.
    """

    why_no_foveation: ClassVar[str] = (
        "its vision tower numbers the rows and columns of whatever it is shown from the first"
    )

    token_side: int
    longest_edge: int
    num_layers: int

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than Pixtral's, or a size that is no longest edge.
        """
        vision = model.get("vision_config") or {}
        tower = vision.get("model_type", "pixtral")
        if tower != "pixtral":
            raise UnsupportedModelError(
                f"vision tower {tower!r} is not supported: this family needs 'pixtral'"
            )
        size = preprocessor.get("size") or {"longest_edge": 1024}
        longest = size.get("longest_edge")
        if not longest:
            raise UnsupportedModelError(f"image processor size {dict(size)} has no 'longest_edge'")
        side = vision.get("patch_size", 16) * model.get("spatial_merge_size", 2)
        return cls(
            side, longest, decoder_layers({"model_type": "mistral", **(model.get("text_config") or {})})
        )

    @property
    def max_tokens(self) -> int:
        """Those of a square."""
        return self.grid(self.longest_edge, self.longest_edge).num_tokens

    def grid(self, width: int, height: int) -> ImageTokens:
        """All rows but the last with their breaks, then the last.

        Raises:
            UnsupportedImageError: one side is reduced to less than a pixel, as no image processor can.
        """
        rows, cols = self._cells(width, height)
        if rows == 1:
            return TokenGrid(rows, cols)
        last = (rows - 1) / rows
        upper = GridPart(TokenGrid(rows - 1, cols), Box(0.0, 0.0, 1.0, last), newlines=True)
        return TokenGrids(
            (upper, GridPart(TokenGrid(1, cols), Box(0.0, last, 1.0, 1.0), first=upper.num_tokens))
        )

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        ratio = max(width / self.longest_edge, height / self.longest_edge)
        if ratio > 1:
            reduced = math.floor(width / ratio), math.floor(height / ratio)
            if not all(reduced):
                raise UnsupportedImageError(
                    f"an image of {width} x {height} pixels has nothing left of its short side once the long "
                    f"one is reduced to {self.longest_edge}"
                )
            width, height = reduced
        return (height - 1) // self.token_side + 1, (width - 1) // self.token_side + 1

    def view(self, width: int, height: int) -> ImageView:
        """All of the image."""
        return ImageView(Box(0.0, 0.0, 1.0, 1.0))

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of whole tokens."""
        rows, cols = self._cells(width, height)
        return cols * self.token_side, rows * self.token_side
