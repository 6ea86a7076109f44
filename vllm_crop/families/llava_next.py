# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision: the image whole in one tile, and again larger in several.

Follows transformers' LlavaNextImageProcessor, its select_best_resolution and get_patch_output_size, and
pack_image_features of modeling_llava_next.py and modeling_llava_onevision.py, roundings included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.llava import CLIP, SIGLIP, tower_of
from vllm_crop.families.plain import PlainText
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.planning.foveation import Piece, Sight, whole_piece
from vllm_crop.planning.geometry import (
    Box,
    GridPart,
    ImageTokens,
    ImageView,
    Mask,
    Region,
    TokenGrid,
    TokenGrids,
)

_DECIMALS = 7  # upstream rounds the length of a side to these before it takes whole tokens
_MOST_SCALED = 1.1  # how much longer than allowed the sides of a grid may be before it is scaled down


@dataclass(frozen=True)
class TilingProcessor:
    """What an image processor of transformers does with settings it is not given.

    Attributes:
        resolutions: `image_grid_pinpoints`, also of the model.
        size: edges of the tile that shows the whole image.
        crop_size: edges of the other tiles; None for those of `size`.
        max_tiles: tokens of a larger grid are scaled down to those of this many tiles; None leaves them.
    """

    resolutions: Sequence[Sequence[int]]
    size: Mapping[str, int]
    crop_size: Mapping[str, int] | None
    max_tiles: int | None


LLAVA_NEXT = TilingProcessor(
    resolutions=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    size={"shortest_edge": 224},
    crop_size={"height": 224, "width": 224},
    max_tiles=None,
)
LLAVA_ONEVISION = TilingProcessor(
    resolutions=tuple(product(range(384, 2305, 384), repeat=2)),
    size={"height": 384, "width": 384},
    crop_size=None,
    max_tiles=9,  # vLLM knows no other `vision_aspect_ratio` than "anyres_max_9"
)


@dataclass(frozen=True)
class AnyResolution:
    """The geometry of a LlavaNextImageProcessor or LlavaOnevisionImageProcessor.

    Where a tile has pixels left that fit no patch (SigLIP's 384 are 27 patches of 14 and 6), places in it are
    off by less than half a token.

    Attributes:
        tile_pixels: side of a tile, which is the vision tower's input.
        tile_tokens: tokens along that side.
        resolutions: (height, width) in pixels that images are fitted into, whole tiles each.
        max_tiles: as of TilingProcessor.
    """

    tile_pixels: int
    tile_tokens: int
    resolutions: tuple[tuple[int, int], ...]
    max_tiles: int | None

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        processor: TilingProcessor,
        tile_pixels: int,
        tile_tokens: int,
        pinpoints: Sequence[Sequence[int]] | None,
    ) -> Self:
        """Read `preprocessor_config.json`, or the `to_dict()` of a loaded image processor.

        Args:
            settings: empty where they are not known.
            processor: what it does with those left out.
            tile_pixels: the vision tower's `image_size`.
            tile_tokens: tokens along it.
            pinpoints: `image_grid_pinpoints` of the model; None for transformers' default.

        Raises:
            UnsupportedModelError: the settings do not fit the model.
        """
        resolutions = _pairs(pinpoints or processor.resolutions)
        if any(side % tile_pixels for resolution in resolutions for side in resolution):
            raise UnsupportedModelError(
                f"image_grid_pinpoints {list(resolutions)} are not whole tiles of {tile_pixels} pixels"
            )
        if settings:
            found = _pairs(settings.get("image_grid_pinpoints") or processor.resolutions)
            if found != resolutions:
                raise UnsupportedModelError(
                    f"the image processor's image_grid_pinpoints {list(found)} are not those of config.json, "
                    f"{list(resolutions)}"
                )
            for key, default in (("size", processor.size), ("crop_size", processor.crop_size)):
                size = settings.get(key, default)
                if size is not None and _edges(size) != {tile_pixels}:
                    raise UnsupportedModelError(
                        f"the image processor's {key} {size} is not the vision tower's image_size, "
                        f"{tile_pixels}"
                    )
        return cls(tile_pixels, tile_tokens, resolutions, processor.max_tiles)

    @property
    def max_tokens(self) -> int:
        """The most visual tokens: of grids that fill a resolution along one side, maybe not the other."""
        grids = [
            self._scaled(TokenGrid(rows, cols))
            for full_rows, full_cols in map(self._unpadded, self.resolutions)
            for rows, cols in chain(
                ((full_rows, cols) for cols in range(full_cols, 0, -2)),
                ((rows, full_cols) for rows in range(full_rows, 0, -2)),
            )
        ]
        return self.tile_tokens**2 + max(grid.num_tokens + grid.rows for grid in grids)

    def tokens(self, width: int, height: int) -> TokenGrids:
        """The whole image in one tile, its aspect ratio ignored; then its tiles as one grid."""
        whole = GridPart(TokenGrid(self.tile_tokens, self.tile_tokens))
        tiles = self._tiles(width, height, whole.num_tokens)
        return TokenGrids((whole, tiles) if tiles.grid.rows else (whole,))

    def _tiles(self, width: int, height: int, first: int) -> GridPart:
        resolution = self._resolution(width, height)
        rows, cols = self._unpadded(resolution)
        if width / height > cols / rows:
            margins = (rows - int(round(height * (cols / width), _DECIMALS))) // 2, 0
        else:
            margins = 0, (cols - int(round(width * (rows / height), _DECIMALS))) // 2
        left = TokenGrid(rows - 2 * margins[0], cols - 2 * margins[1])
        grid = self._scaled(left)
        if not grid.num_tokens:  # a line so thin that upstream cuts all but the newlines away
            return GridPart(grid, first=first, newlines=True)
        shown = _fitted(width, height, resolution)
        y, x = (
            _window(margin, tokens, self.tile_pixels / self.tile_tokens, side, length)
            for margin, tokens, side, length in zip(
                margins, (left.rows, left.cols), resolution, shown, strict=True
            )
        )
        return GridPart(grid, Box(x[0], y[0], x[1], y[1]), first, newlines=True)

    def unseen(self, width: int, height: int, seen: Sequence[Piece]) -> Mask:
        """Tokens of the grid of tiles whose middle is in none that is `seen`, `[num_tokens]`.

        So are newlines of rows without a token that is seen.
        """
        tokens, tiles = self.tokens(width, height), self.tiles(width, height)
        unseen = np.zeros(tokens.num_tokens, dtype=bool)
        side = self.tile_tokens
        shown = np.zeros((tiles.scale.rows // side, tiles.scale.cols // side), dtype=bool)
        for piece in seen:
            shown[piece.window[0] // side, piece.window[2] // side] = True
        for part in tokens.parts[1:]:
            rows, cols = tiles.tiles_of(part)
            hidden = ~shown[np.ix_(rows, cols)]
            newlines = np.repeat(hidden.all(axis=1, keepdims=True), part.newlines, axis=1)
            unseen[part.first :] = np.concatenate([hidden, newlines], axis=1).reshape(-1)
        return unseen

    def tiles(self, width: int, height: int) -> "Tiles":
        """How an image of this size lies in the tiles that show it larger."""
        resolution = self._resolution(width, height)
        return Tiles(resolution, _fitted(width, height, resolution), self.tile_pixels, self.tile_tokens)

    def _unpadded(self, resolution: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of all tiles, before padding is cut off."""
        rows, cols = (side // self.tile_pixels * self.tile_tokens for side in resolution)
        return rows, cols

    def _scaled(self, grid: TokenGrid) -> TokenGrid:
        """The grid that a larger one than allowed is interpolated to; others as they are."""
        if self.max_tiles is None:
            return grid
        ratio = math.sqrt(grid.num_tokens / (self.max_tiles * self.tile_tokens**2))
        return TokenGrid(int(grid.rows // ratio), int(grid.cols // ratio)) if ratio > _MOST_SCALED else grid

    def _resolution(self, width: int, height: int) -> tuple[int, int]:
        """The one that shows most of the image's pixels, and of those the one with the least padding."""

        def quality(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[1] / width, resolution[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - resolution[0] * resolution[1]

        return max(self.resolutions, key=quality)


@dataclass(frozen=True)
class Tiles:
    """The tiles that show an image larger, their padding included.

    Attributes:
        resolution: height and width in pixels of all of them.
        shown: those of the image in the middle of it.
        tile_pixels, tile_tokens: along the side of one.
    """

    resolution: tuple[int, int]
    shown: tuple[int, int]
    tile_pixels: int
    tile_tokens: int

    @property
    def scale(self) -> TokenGrid:
        """Tokens of all of them."""
        rows, cols = (side // self.tile_pixels * self.tile_tokens for side in self.resolution)
        return TokenGrid(rows, cols)

    def touched(self, region: Region) -> list[Piece]:
        """The tiles that show some of the region, row by row."""
        side = self.tile_tokens
        pieces = []
        for row, col in product(range(self.scale.rows // side), range(self.scale.cols // side)):
            if any(self._touches(box, row, col) for box in region.boxes):
                span = (row * side, (row + 1) * side, col * side, (col + 1) * side)
                pieces.append(Piece(self.scale, span, span))
        return pieces

    def tiles_of(self, part: GridPart) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """In which row and which column of tiles the middles of a grid's rows and columns are."""
        window, (down, across) = part.window, self._margins
        rows = self._tiles_along(window.y0, window.y1, part.grid.rows, down, self.shown[0])
        cols = self._tiles_along(window.x0, window.x1, part.grid.cols, across, self.shown[1])
        return rows, cols

    def _tiles_along(
        self, start: float, end: float, count: int, margin: int, shown: int
    ) -> NDArray[np.int64]:
        middles = start + (np.arange(count) + 0.5) / count * (end - start)
        return ((margin + middles * shown) // self.tile_pixels).astype(np.int64)

    def _touches(self, box: Box, row: int, col: int) -> bool:
        sides = zip((row, col), ((box.y0, box.y1), (box.x0, box.x1)), self._margins, self.shown, strict=True)
        return all(
            index * self.tile_pixels < margin + end * shown
            and margin + start * shown < (index + 1) * self.tile_pixels
            for index, (start, end), margin, shown in sides
        )

    def places_in_whole(self) -> NDArray[np.int64]:
        """For each token of the tiles, row by row, the one of the whole image's tile that shows its middle.

        Padding gets what is nearest to it, which is cut away again.
        """
        side, counts = self.tile_tokens, (self.scale.rows, self.scale.cols)
        rows, cols = (
            np.clip(
                # The middle's pixel in the image, in tokens of a tile that shows all of it.
                ((2 * np.arange(count) + 1) * self.tile_pixels - 2 * margin * side) // (2 * shown),
                0,
                side - 1,
            )
            for count, margin, shown in zip(counts, self._margins, self.shown, strict=True)
        )
        return (rows[:, None] * side + cols).reshape(-1)

    @property
    def _margins(self) -> tuple[int, int]:
        height, width = ((side - shown) // 2 for side, shown in zip(self.resolution, self.shown, strict=True))
        return height, width


def _pairs(pinpoints: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in pinpoints)


def _edges(size: Any) -> set[int]:
    """The lengths that a `size` or `crop_size` names."""
    return {size} if isinstance(size, int) else {edge for edge in size.values() if edge is not None}


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


@dataclass(frozen=True)
class LlavaNextGeometry(PlainText):
    """LLaVA-NeXT: the whole image in one square tile, then larger in several, each row with a newline."""

    why_no_foveation: ClassVar[str] = ""
    foveation_settings: ClassVar[frozenset[str]] = frozenset({"rim_size", "unseen_tiles"})

    tiling: AnyResolution
    num_layers: int

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than CLIP or SigLIP, or other features of it, or the
                two do not fit each other.
        """
        pinpoints, sides = model.get("image_grid_pinpoints"), tower_of(model, CLIP, SIGLIP).sides(model)
        tiling = AnyResolution.from_settings(preprocessor, LLAVA_NEXT, *sides, pinpoints)
        return cls(tiling, decoder_layers(model.get("text_config") or {}))

    @property
    def max_tokens(self) -> int:
        """Those of an image that fills a resolution."""
        return self.tiling.max_tokens

    def grid(self, width: int, height: int) -> ImageTokens:
        """The tile of the whole image, then the grid of the others without their padding."""
        return self.tiling.tokens(width, height)

    def view(self, width: int, height: int) -> ImageView:
        """All of the image."""
        return ImageView(Box(0.0, 0.0, 1.0, 1.0))

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of the image: the model sees it in several sizes at once."""
        return width, height

    def foveate(
        self, width: int, height: int, region: Region, around: Region | None, sight: Sight
    ) -> tuple[Piece, ...]:
        """The whole image in one tile, and of the other tiles those that show the region."""
        tiles = self.tiling.tiles(width, height)
        wanted = region if sight.half_rims or around is None else Region((*region.boxes, *around.boxes))
        touched = tiles.touched(wanted)
        if len(touched) * self.tiling.tile_tokens**2 == tiles.scale.num_tokens:
            return ()
        return (*self.overview(width, height), *touched)

    def small(self, width: int, height: int, max_tokens: int) -> tuple[Piece, ...]:
        """The tile of the whole image; it may have more tokens than wanted, which are pooled."""
        return self.overview(width, height) if max_tokens <= self.tiling.tile_tokens**2 else ()

    def overview(self, width: int, height: int) -> tuple[Piece, ...]:
        """The tile of the whole image."""
        side = self.tiling.tile_tokens
        return (whole_piece(TokenGrid(side, side)),)

    def unseen(self, width: int, height: int, pieces: Sequence[Piece]) -> Mask | None:
        """The tokens of tiles that are none of the pieces, and newlines of rows that have only such."""
        return self.tiling.unseen(width, height, pieces[1:]) if pieces else None


class LlavaOnevisionGeometry(LlavaNextGeometry):
    """LLaVA-OneVision: the same with SigLIP's tiles, whose grid is scaled down where there are too many."""

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than SigLIP, not all of its features, or the two do
                not fit each other.
        """
        pinpoints, sides = model.get("image_grid_pinpoints"), tower_of(model, SIGLIP).sides(model)
        tiling = AnyResolution.from_settings(preprocessor, LLAVA_ONEVISION, *sides, pinpoints)
        return cls(tiling, decoder_layers({"model_type": "qwen2", **(model.get("text_config") or {})}))
