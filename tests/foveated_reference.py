# SPDX-License-Identifier: Apache-2.0
"""The exact reference for images that are seen in pieces: transformers' vision tower, piece by piece.

Of families with tiles, those that are not seen are replaced after the tower, token by token.
Each piece is cut out of the whole picture at its scale, token by token, with its place in it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from transformers import vision_utils

from tests.reference import DEFAULT_RIM, HfQwen2_5VL, HfReference
from vllm_crop.config import CropConfig
from vllm_crop.families.view_size import size_for_tokens
from vllm_crop.localizers.thumbnails import shrink
from vllm_crop.models.piece_pixels import pixels_of
from vllm_crop.planner import ImagePlan, Planner
from vllm_crop.planning.foveation import Piece
from vllm_crop.planning.geometry import TokenGrid
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.request import ImageRequest


def foveating(
    reference: type[HfReference], checkpoint: Path, config: CropConfig, overview: bool = False
) -> HfReference:
    """The reference of a family as `reference` makes it, but for what the tower sees of pruned images."""
    # tests/unit/test_foveation.py says which
    leaves_out = overview or config.foveation.unseen_tiles == "left_out"
    gather = gathered if issubclass(reference, HfQwen2_5VL) else tiled

    class Foveating(reference):  # type: ignore[valid-type, misc]
        def plan(self, image: Image.Image, region: Any, *args: Any, **kwargs: Any) -> TokenPlan | None:
            plan = super().plan(image, region, *args, **kwargs)
            if plan is None:
                return None
            planned = planned_for(self, image, region, args, kwargs)
            if leaves_out:
                plan = planned.tokens
            self.pieces[plan] = planned.pieces
            return plan

        def features_of(self, image: Image.Image, plan: TokenPlan) -> torch.Tensor:
            pieces = self.pieces.get(plan, ())
            return gather(self, image, plan.grid, pieces) if pieces else self.features(image)

    def planned_for(hf: Any, image: Image.Image, region: Any, args: Any, kwargs: Any) -> ImagePlan:
        names = ("pruning_rate", "compression", "method", "eviction_layers", "rim")
        asked = {"rim": DEFAULT_RIM, **dict(zip(names, args, strict=False)), **kwargs}
        request = ImageRequest(region, overview=overview, **asked)
        planned: ImagePlan = hf.planner.plan_image(request, *image.size)
        return planned

    found = Foveating(checkpoint)
    found.pieces, found.planner = {}, Planner(config, found.geometry)
    return found


def gathered(hf: Any, image: Image.Image, grid: TokenGrid, pieces: Sequence[Piece]) -> torch.Tensor:
    """Each token's features from the last piece that shows its middle, `[num_tokens, hidden]`."""
    view, *others = pieces
    found = [(view, view_features(hf, image, view))]
    found += [(piece, piece_features(hf, image, piece)) for piece in others]
    rows = []
    for row in range(grid.rows):
        for col in range(grid.cols):
            for piece, features in reversed(found):
                y = int((row + 0.5) / grid.rows * piece.scale.rows)
                x = int((col + 0.5) / grid.cols * piece.scale.cols)
                top, bottom, left, right = piece.inner
                if top <= y < bottom and left <= x < right:
                    rows.append(features[(y - piece.window[0]) * piece.cols + x - piece.window[2]])
                    break
            else:
                raise AssertionError(f"no piece shows token {row}, {col}")
    return torch.stack(rows)


def tiled(hf: Any, image: Image.Image, _: Any, pieces: Sequence[Piece]) -> torch.Tensor:
    """Tokens of unseen tiles are those of the whole image's tile that show their middle."""
    (whole, *others), geometry = pieces, hf.geometry.tiling
    side, pixels = whole.rows, geometry.tile_pixels
    height, width = geometry.tiles(*image.size).resolution
    scale = min(width / image.width, height / image.height)
    shown = min(height, math.ceil(image.height * scale)), min(width, math.ceil(image.width * scale))
    margins = (height - shown[0]) // 2, (width - shown[1]) // 2
    seen = {(piece.window[0] // side, piece.window[2] // side) for piece in others}
    stock = hf.model.model.pack_image_features

    def pack(features: Any, *args: Any, **kwargs: Any) -> Any:
        (tiles,) = features
        tiles = tiles.clone()
        for index in range(1, len(tiles)):
            row, col = divmod(index - 1, width // pixels)
            if row * pixels >= height or (row, col) in seen:
                continue
            for token in range(side * side):
                y, x = divmod(token, side)
                at = [
                    ((tile * side + place + 0.5) * pixels / side - margin) / length * side
                    for tile, place, margin, length in zip((row, col), (y, x), margins, shown, strict=True)
                ]
                down, right = (min(max(math.floor(one), 0), side - 1) for one in at)
                tiles[index, token] = tiles[0, down * side + right]
        return stock([tiles], *args, **kwargs)

    with patch.object(hf.model.model, "pack_image_features", pack):
        features: torch.Tensor = hf.features(image)
    return features


def view_features(hf: Any, image: Image.Image, view: Piece) -> torch.Tensor:
    """Of the small picture, as if it had been sent."""
    most = hf.planner.view_tokens(hf.geometry.grid(*image.size).num_tokens)
    size = size_for_tokens(hf.geometry, *image.size, most)
    assert size is not None
    assert hf.geometry.grid(*size) == view.scale
    features: torch.Tensor = hf.features(shrink(image, size))
    return features


def piece_features(hf: Any, image: Image.Image, piece: Piece) -> torch.Tensor:
    """Of a part of the whole picture at one scale; its patches keep their places in it."""
    processor, visual = hf.processor.image_processor, hf.model.model.visual
    merge = processor.merge_size
    side = processor.patch_size * merge
    row0, row1, col0, col1 = piece.window
    # The same cut, which tests/unit/test_foveation.py compares with the whole picture's pixels, at its place.
    scaled = Image.new("RGB", (piece.scale.cols * side, piece.scale.rows * side))
    scaled.paste(pixels_of(image, piece, side, Image.Resampling.BICUBIC), (col0 * side, row0 * side))
    whole = processor(scaled, do_resize=False, return_tensors="pt")
    tokens = [row * piece.scale.cols + col for row in range(row0, row1) for col in range(col0, col1)]
    patches = torch.tensor([token * merge**2 + patch for token in tokens for patch in range(merge**2)])
    grid = whole["image_grid_thw"]
    places = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)[patches]}
    if hasattr(visual, "pos_embed"):
        places |= stretched(visual, grid, patches)
    if hasattr(visual, "window_size"):
        places |= windows(tokens, piece.scale.cols, visual.window_size // side, merge**2)
    with stretched_over(visual, grid):
        seen = visual(
            whole["pixel_values"][patches].to(hf.model.dtype),
            grid_thw=torch.tensor([[1, piece.rows * merge, piece.cols * merge]]),
            **places,
        )
    return torch.cat([seen.pooler_output, *getattr(seen, "deepstack_features", ())], dim=1)


@contextmanager
def stretched_over(visual: Any, grid: torch.Tensor) -> Iterator[None]:
    """Learned embeddings are those of the whole picture in a tower that is told its size (GLM-4V)."""
    if not hasattr(visual, "embeddings"):
        yield
        return
    stock = visual.embeddings.forward

    def forward(patches: Any, lengths: Any, _: Any, rows: Any, cols: Any) -> Any:
        return stock(patches, lengths, grid, rows, cols)

    with patch.object(visual.embeddings, "forward", forward):
        yield


def stretched(visual: Any, grid: torch.Tensor, patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which learned embeddings patches get, of those of the whole picture."""
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.config.spatial_merge_size,
    )
    return {"interp_indices": indices[patches], "interp_weights": weights[patches]}


def windows(tokens: Sequence[int], cols: int, side: int, per_token: int) -> dict[str, torch.Tensor]:
    """Which of some tokens look at each other where the whole picture is cut into windows."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, token in enumerate(tokens):
        row, col = divmod(token, cols)
        members.setdefault((row // side, col // side), []).append(index)
    order = [index for window in sorted(members) for index in members[window]]
    ends = torch.tensor([0, *(len(members[window]) * per_token for window in sorted(members))]).cumsum(0)
    return {"window_index": torch.tensor(order), "cu_window_seqlens": ends.to(torch.int32)}
