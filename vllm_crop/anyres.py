# SPDX-License-Identifier: Apache-2.0
"""Which tokens an image gets from a processor that shows it whole and again in tiles (LLaVA-NeXT).

Follows transformers' LlavaNextImageProcessor, its select_best_resolution and get_patch_output_size, and
unpad_image of modeling_llava_next.py, roundings included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.geometry import Box, GridPart, TokenGrid
from vllm_crop.token_grids import TokenGrids

DEFAULT_RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_DEFAULT_EDGE = 224  # of the image processor's `size` and `crop_size`
_DECIMALS = 7  # upstream rounds the length of a side to these before it takes whole tokens


@dataclass(frozen=True)
class AnyResolution:
    """The geometry of a LlavaNextImageProcessor.

    Attributes:
        tile_pixels: side of a tile, which is the vision tower's input.
        tile_tokens: tokens along that side.
        resolutions: (height, width) in pixels that images are fitted into, whole tiles each.
    """

    tile_pixels: int
    tile_tokens: int
    resolutions: tuple[tuple[int, int], ...]

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        tile_pixels: int,
        tile_tokens: int,
        pinpoints: Sequence[Sequence[int]] | None,
    ) -> Self:
        """Read `preprocessor_config.json`, or the `to_dict()` of a loaded image processor.

        Args:
            settings: empty where they are not known.
            tile_pixels: the vision tower's `image_size`.
            tile_tokens: tokens along it.
            pinpoints: `image_grid_pinpoints` of the model; None for transformers' default.

        Raises:
            UnsupportedModelError: the settings do not fit the model.
        """
        resolutions = _resolutions(pinpoints)
        if any(side % tile_pixels for resolution in resolutions for side in resolution):
            raise UnsupportedModelError(
                f"image_grid_pinpoints {list(resolutions)} are not whole tiles of {tile_pixels} pixels"
            )
        if settings:
            found = _resolutions(settings.get("image_grid_pinpoints"))
            if found != resolutions:
                raise UnsupportedModelError(
                    f"the image processor's image_grid_pinpoints {list(found)} are not those of config.json, "
                    f"{list(resolutions)}"
                )
            for key in ("size", "crop_size"):
                edges = _edges(settings.get(key))
                if edges != {tile_pixels}:
                    raise UnsupportedModelError(
                        f"the image processor's {key} {settings.get(key)} is not the vision tower's "
                        f"image_size, {tile_pixels}"
                    )
        return cls(tile_pixels, tile_tokens, resolutions)

    @property
    def max_tokens(self) -> int:
        """Visual tokens of the largest image: one that fills its resolution."""
        return max(self.tokens(width, height).num_tokens for height, width in self.resolutions)

    def tokens(self, width: int, height: int) -> TokenGrids:
        """The whole image in one tile, its aspect ratio ignored; then its tiles as one grid."""
        whole = GridPart(TokenGrid(self.tile_tokens, self.tile_tokens))
        tiles = self._tiles(width, height, whole.num_tokens)
        return TokenGrids((whole, tiles) if tiles.grid.rows else (whole,))

    def _tiles(self, width: int, height: int, first: int) -> GridPart:
        resolution = self._resolution(width, height)
        rows, cols = (side // self.tile_pixels * self.tile_tokens for side in resolution)
        if width / height > cols / rows:
            margins = (rows - int(round(height * (cols / width), _DECIMALS))) // 2, 0
        else:
            margins = 0, (cols - int(round(width * (rows / height), _DECIMALS))) // 2
        grid = TokenGrid(rows - 2 * margins[0], cols - 2 * margins[1])
        if not grid.num_tokens:  # a line so thin that upstream cuts all but the newlines away
            return GridPart(grid, first=first, newlines=True)
        shown = _fitted(width, height, resolution)
        y, x = (
            _window(margin, tokens, self.tile_pixels / self.tile_tokens, side, length)
            for margin, tokens, side, length in zip(
                margins, (grid.rows, grid.cols), resolution, shown, strict=True
            )
        )
        return GridPart(grid, Box(x[0], y[0], x[1], y[1]), first, newlines=True)

    def _resolution(self, width: int, height: int) -> tuple[int, int]:
        """The one that shows most of the image's pixels, and of those the one with the least padding."""

        def quality(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[1] / width, resolution[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - resolution[0] * resolution[1]

        return max(self.resolutions, key=quality)


def _resolutions(pinpoints: Sequence[Sequence[int]] | None) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in pinpoints or DEFAULT_RESOLUTIONS)


def _edges(size: Any) -> set[int]:
    """The lengths that a `size` or `crop_size` names."""
    if size is None or isinstance(size, int):
        return {size or _DEFAULT_EDGE}
    return {edge for edge in size.values() if edge is not None}


def _fitted(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of an image resized to fit into a resolution."""
    scale_x, scale_y = resolution[1] / width, resolution[0] / height
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), resolution[0]), resolution[1]
    return resolution[0], min(math.ceil(width * scale_y), resolution[1])


def _window(margin: int, tokens: int, token_pixels: float, side: int, shown: int) -> tuple[float, float]:
    """What a grid shows along one side, in fractions of the image: padding is cut off in whole tokens.

    Args:
        margin: tokens cut off before it.
        side: pixels of the resolution.
        shown: those of the image in it, with the padding shared out evenly.
    """
    start = margin * token_pixels - (side - shown) // 2
    return start / shown, (start + tokens * token_pixels) / shown
