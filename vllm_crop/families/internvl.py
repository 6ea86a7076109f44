# SPDX-License-Identifier: Apache-2.0
"""InternVL: the image in tiles of one size, its aspect ratio bent to theirs, and once more small in one tile.

Follows get_optimal_tiled_canvas of transformers' GotOcr2ImageProcessor and, for checkpoints in their first
format, vllm/transformers_utils/processors/internvl.py, which is the same rule with settings of other names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, ClassVar, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.plain import PlainText, SeenWhole
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.planning.geometry import Box, GridPart, ImageTokens, ImageView, TokenGrid, TokenGrids


@dataclass(frozen=True)
class InternVLGeometry(PlainText, SeenWhole):
    """InternVL as transformers has it (`InternVLForConditionalGeneration`).

    Attributes:
        tile_tokens: along the side of a tile.
        min_tiles, max_tiles: of an image, without the small one.
        thumbnail: an image of several tiles comes once more in one, after them.
    """

    why_no_foveation: ClassVar[str] = "all tiles of an image go through it together"

    tile_tokens: int
    tile_pixels: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    num_layers: int

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        `crop_to_patches` in them is without effect: transformers' InternVLProcessor sets it for each call.

        Raises:
            UnsupportedModelError: the two do not fit each other.
        """
        pixels, tokens = _tile(model)
        size = preprocessor.get("size")
        if size is not None and set(size.values()) != {pixels}:
            raise UnsupportedModelError(
                f"the image processor's size {dict(size)} is not the vision tower's image_size, {pixels}"
            )
        fewest, most = (preprocessor.get(f"{bound}_patches", of) for bound, of in (("min", 1), ("max", 12)))
        layers = decoder_layers(model.get("text_config") or {"model_type": "qwen2"})
        return cls(tokens, pixels, fewest, most, thumbnail=True, num_layers=layers)

    @property
    def max_tokens(self) -> int:
        """Those of an image with as many tiles as there may be."""
        tiles = self.max_tiles + (self.thumbnail and self.max_tiles > 1)
        return tiles * self.tile_tokens**2

    def grid(self, width: int, height: int) -> ImageTokens:
        """Each tile a grid of its own, row by row, then the whole image."""
        rows, cols = self._tiles(width, height)
        tile = TokenGrid(self.tile_tokens, self.tile_tokens)
        if rows == cols == 1:
            return tile
        windows = [
            Box(col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
            for row, col in product(range(rows), range(cols))
        ]
        if self.thumbnail:
            windows.append(Box(0.0, 0.0, 1.0, 1.0))
        return TokenGrids(
            tuple(GridPart(tile, window, index * tile.num_tokens) for index, window in enumerate(windows))
        )

    def _tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles: of all there may be those with the aspect ratio that is nearest.

        Of several as near the one with more tiles, unless half of their pixels would be made up.
        """
        found, smallest = (1, 1), float("inf")
        for cols, rows in _arrangements(self.min_tiles, self.max_tiles):
            distance = abs(width / height - cols / rows)
            filled = width * height > 0.5 * self.tile_pixels**2 * cols * rows
            if distance < smallest or (distance == smallest and filled):
                found, smallest = (rows, cols), distance
        return found

    def view(self, width: int, height: int) -> ImageView:
        """All of the image."""
        return ImageView(Box(0.0, 0.0, 1.0, 1.0))

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of the image: the model sees it in several sizes at once."""
        return width, height


class InternVLChatGeometry(InternVLGeometry):
    """InternVL as OpenGVLab publishes it (`InternVLChatModel`)."""

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json`, and what the server was told over it.

        Raises:
            UnsupportedModelError: tiles are of another size than the vision tower's.
        """
        pixels, tokens = _tile(model)
        sizes = {
            "force_image_size": model.get("force_image_size"),
            "image_size": preprocessor.get("image_size"),
        }
        for name, size in sizes.items():
            if size not in (None, pixels):
                raise UnsupportedModelError(
                    f"{name} {size} is not the vision tower's image_size, {pixels}, which is all it can see"
                )

        def setting(name: str, default: int) -> int:
            return int(preprocessor.get(name, model.get(name, default)))

        # Defaults are those of the configuration class in the checkpoints' repositories.
        dynamic = bool(setting("dynamic_image_size", False))
        fewest, most = setting("min_dynamic_patch", 1), setting("max_dynamic_patch", 6)
        # transformers leaves the name in the file, vLLM calls it as elsewhere.
        text = model.get("text_config") or model.get("llm_config") or {}
        return cls(
            tokens,
            pixels,
            fewest if dynamic else 1,
            most if dynamic else 1,
            thumbnail=bool(setting("use_thumbnail", False)),
            num_layers=decoder_layers(text),
        )


@cache
def _arrangements(fewest: int, most: int) -> list[tuple[int, int]]:
    """Columns and rows of so many tiles, few tiles first."""
    sides = range(1, most + 1)
    possible = [(cols, rows) for cols, rows in product(sides, sides) if fewest <= cols * rows <= most]
    return sorted(possible, key=lambda pair: pair[0] * pair[1])


def _tile(model: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels and tokens along the side of a tile.

    Raises:
        UnsupportedModelError: tiles are no squares.
    """
    vision = model.get("vision_config") or {}
    sides = [vision.get("image_size", 448), vision.get("patch_size", 14)]
    squares = [set(side) if isinstance(side, list | tuple) else {side} for side in sides]
    if any(len(square) > 1 for square in squares):
        raise UnsupportedModelError(
            f"tiles and patches of {sides} pixels are no squares, which is not supported"
        )
    pixels, patch = (square.pop() for square in squares)
    return pixels, int(pixels // patch * model.get("downsample_ratio", 0.5))
