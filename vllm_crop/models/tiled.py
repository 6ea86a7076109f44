# SPDX-License-Identifier: Apache-2.0
"""Models that see the whole image in one tile and again in several, their rows ended by newlines.

A foveated image has no other tiles than those that show its region. What the others would have shown is taken
from the tile of the whole image, so that all that follows (padding cut off, newlines, scaling) is as upstream
has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_crop.families.llava_next import LlavaNextGeometry, Tiles
from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.encoder import Encode, Part, SeenImage
from vllm_crop.models.image_keys import image_key, piece_keys
from vllm_crop.models.plan_fields import IMAGE_KEY, PIECES, piece_numbers, pieces_of
from vllm_crop.models.processor import CropItems, CropProcessorMixin
from vllm_crop.models.seen_tiles import only_tiles
from vllm_crop.planning.foveation import Piece


class CropTiledProcessorMixin(CropProcessorMixin):
    """CropProcessorMixin for image processors that make tiles, the whole image first."""

    def can_be_foveated(self, is_picture: bool) -> bool:
        """Tiles can be left out of whatever the image processor takes."""
        return True

    def images_processed(self, mm_items: Any, hf_kwargs: Mapping[str, object], items: CropItems) -> Any:
        """As the stock processor, without the tiles that are not seen."""
        decisions = items.decisions
        if not any(decision.pieces for decision in decisions):
            return self.stock_processed(mm_items, hf_kwargs)
        seen = [_places(decision.pieces) if decision.pieces else None for decision in decisions]
        with only_tiles(self.info.get_hf_processor(**hf_kwargs).image_processor, seen) as wanted:
            data = self.stock_processed(mm_items, hf_kwargs)
        tiles, keys = list(data["pixel_values"]), [image_key(one) for one in items.image_hashes]
        for index, decision in enumerate(decisions):
            if not decision.pieces:
                continue
            # What was not picked before is picked here. A batch is padded to the most tiles of an image: a
            # view of a few would keep all of it in memory.
            few = slice(len(decision.pieces)) if wanted.cut else seen[index]
            tiles[index] = tiles[index][few].clone()
            if image_hash := items.image_hashes[index]:
                keys[index] = piece_keys(image_hash, decision.pieces)
        data["pixel_values"], data[IMAGE_KEY] = tiles, keys
        data[PIECES] = [piece_numbers(decision.pieces) for decision in decisions]
        return data


def _places(pieces: Sequence[Piece]) -> list[int]:
    """Where their tiles are among those of the image processor."""
    whole, *others = pieces
    side = whole.rows
    rows_and_cols = [(one.window[0] // side, one.window[2] // side, one.scale.cols // side) for one in others]
    return [0, *(1 + row * in_row + col for row, col, in_row in rows_and_cols)]


class TiledImagesMixin(PlainRopeMixin):
    """PlainRopeMixin for a stock model with `pixel_values` and `image_sizes`, as in vLLM's llava_next.py."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        geometry = geometry_from_configs(vllm_config.model_config.hf_config.to_dict(), {})
        assert isinstance(geometry, LlavaNextGeometry)
        self.geometry = geometry

    def merge_tiles(self, size: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """The features of an image in the order of the prompt, as upstream makes them.

        Args:
            size: `[2]`, height and width in pixels.
            tiles: `[1 + tiles, tokens, hidden]`, the whole image first.
        """
        raise NotImplementedError

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """Per image `[its tiles, 3, side, side]`, the whole image first, and `[height, width]` in pixels."""
        tiles, sizes = kwargs["pixel_values"], kwargs["image_sizes"]
        counts = [self.geometry.grid(width, height).num_tokens for height, width in sizes.tolist()]
        in_pieces = pieces_of(kwargs, len(sizes))
        images = [
            self._seen(count, size, pieces) if pieces else SeenImage.whole(count)
            for count, size, pieces in zip(counts, sizes, in_pieces, strict=True)
        ]
        # Of each part, counted through all images: its image, and the tile of it; None for all tiles.
        parts = [
            (image, tile)
            for image, pieces in enumerate(in_pieces)
            for tile in (range(len(pieces)) if pieces else (None,))
        ]

        def encode(picked: Sequence[int]) -> Any:
            asked = [parts[index] for index in picked]
            whole = [image for image, tile in asked if tile is None]
            single = [tiles[image][tile] for image, tile in asked if tile is not None]
            stock = iter(self._encode_whole(tiles, sizes, whole))
            by_itself = iter(self._encode_tiles(single))
            return [next(stock if tile is None else by_itself) for _, tile in asked]

        return images, encode

    def _encode_whole(self, tiles: Any, sizes: torch.Tensor, images: Sequence[int]) -> Any:
        if not images:
            return ()
        if len(images) == len(sizes):
            return self.embed_stock(pixel_values=tiles, image_sizes=sizes)
        return self.embed_stock(pixel_values=[tiles[index] for index in images], image_sizes=sizes[images])

    def _encode_tiles(self, tiles: Sequence[torch.Tensor]) -> Any:
        """`[tokens, hidden]` of each tile by itself."""
        if not tiles:
            return ()
        upstream: Any = super()
        return upstream._process_image_pixels({"pixel_values": [torch.stack(list(tiles))]})[0]

    def _seen(self, num_tokens: int, size: torch.Tensor, pieces: tuple[Piece, ...]) -> SeenImage:
        height, width = size.tolist()
        layout = self.geometry.tiling.tiles(width, height)

        def assemble(seen: Sequence[tuple[Piece, torch.Tensor]]) -> tuple[torch.Tensor, None]:
            return self.merge_tiles(size, _all_tiles(layout, seen)), None

        return SeenImage(num_tokens, tuple(Part(one.num_tokens, one) for one in pieces), assemble)


def _all_tiles(layout: Tiles, seen: Sequence[tuple[Piece, torch.Tensor]]) -> torch.Tensor:
    """`[1 + tiles, tokens, hidden]`, those that were not seen made of the whole image's."""
    (_, whole), *others = seen
    scale, side = layout.scale, layout.tile_tokens
    places = torch.from_numpy(layout.places_in_whole()).to(whole.device)
    grid = whole[places].view(scale.rows, scale.cols, -1)
    for piece, features in others:
        row0, row1, col0, col1 = piece.window
        grid[row0:row1, col0:col1] = features.view(side, side, -1)
    tiles = grid.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
    return torch.cat([whole[None], tiles.flatten(0, 1).flatten(1, 2)])
