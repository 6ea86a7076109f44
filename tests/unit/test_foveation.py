# SPDX-License-Identifier: Apache-2.0
"""What the vision tower sees of a picture: every token once, the region at full size, and for less."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import regions

from tests.pictures import noise_image
from vllm_crop.config import CropConfig
from vllm_crop.families.llava_next import LLAVA_NEXT, AnyResolution, LlavaNextGeometry
from vllm_crop.families.qwen_vl import Qwen2_5VLGeometry, Qwen2VLGeometry
from vllm_crop.models.piece_pixels import pixels_of
from vllm_crop.planner import ImagePlan, Planner
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.foveation import (
    MAX_CROPS,
    FoveationRule,
    Piece,
    Sight,
    describe_pieces,
    foveate,
    sources,
    tower_tokens,
    whole_piece,
)
from vllm_crop.planning.geometry import Box, Region, TokenGrid
from vllm_crop.request import ImageRequest

GRID, VIEW = TokenGrid(64, 48), TokenGrid(16, 12)
SMALL = Region((Box(0.3, 0.3, 0.45, 0.4),))


def rule(halo: int = 2, align: int = 1, view: TokenGrid = VIEW) -> FoveationRule:
    return FoveationRule(view, halo, align)


grids = st.builds(TokenGrid, st.integers(1, 40), st.integers(1, 40))


@given(grids, regions(), st.floats(0, 0.3), st.integers(0, 4), st.integers(1, 5), st.data())
def test_every_token_is_seen_and_the_region_at_full_size(
    grid: TokenGrid, region: Region, rim: float, halo: int, align: int, data: st.DataObject
) -> None:
    view = TokenGrid(data.draw(st.integers(1, grid.rows)), data.draw(st.integers(1, grid.cols)))
    around = region.widened(rim) if rim else None
    pieces = foveate(grid, region, around, rule(halo, align, view))
    if not pieces:
        return
    assert tower_tokens(pieces) < grid.num_tokens
    assert pieces[0] == whole_piece(view)
    found = sources(grid, pieces)
    assert found.min() >= 0
    assert found.max() < tower_tokens(pieces)
    tokens = [place for place in places(pieces)]
    for token in grid.mask(region).nonzero()[0]:
        piece, row, col = tokens[found[token]]
        assert piece.scale == grid
        assert (row, col) == divmod(int(token), grid.cols)
    for piece in pieces[1:]:
        check_window(piece, halo if piece.scale == grid else 0, align)


def places(pieces: tuple[Piece, ...]) -> list[tuple[Piece, int, int]]:
    """Which token of which scale each encoded one is."""
    return [
        (piece, row, col)
        for piece in pieces
        for row in range(piece.window[0], piece.window[1])
        for col in range(piece.window[2], piece.window[3])
    ]


def check_window(piece: Piece, halo: int, align: int) -> None:
    """The halo is there as far as the picture goes, and windows are cut where the whole picture's are."""
    for (start, end), (first, last), length in (
        (piece.inner[:2], piece.window[:2], piece.scale.rows),
        (piece.inner[2:], piece.window[2:], piece.scale.cols),
    ):
        assert first <= max(0, start - halo)
        assert last >= min(length, end + halo)
        assert first % align == 0
        assert last % align == 0 or last == length
        assert first > start - halo - align
        assert last < end + halo + align


def test_a_larger_halo_sees_more() -> None:
    costs = [tower_tokens(foveate(GRID, SMALL, None, rule(halo))) for halo in (0, 1, 2, 4)]
    assert costs == sorted(costs)
    assert len(set(costs)) == 4


def test_a_rim_is_seen_at_half_the_size() -> None:
    view, between, crop = foveate(GRID, SMALL, SMALL.widened(0.125), rule())
    assert (view.scale, between.scale, crop.scale) == (VIEW, TokenGrid(32, 24), GRID)
    found = sources(GRID, (view, between, crop)).reshape(64, 48)
    inside, near, far = found[20, 16], found[13, 16], found[60, 40]
    assert far < view.num_tokens <= near < view.num_tokens + between.num_tokens <= inside
    assert describe_pieces((view, crop)) == "all of it as 16 x 12, 11 x 12 of 64 x 48"


def test_a_rim_can_be_seen_at_full_size() -> None:
    sharp = FoveationRule(VIEW, 2, half_rims=False)
    view, crop = foveate(GRID, SMALL, SMALL.widened(0.125), sharp)
    assert crop.scale == GRID
    assert sources(GRID, (view, crop)).reshape(64, 48)[13, 16] >= view.num_tokens


def test_boxes_beside_each_other_are_one_crop_and_distant_ones_two() -> None:
    left, right = Box(0.1, 0.1, 0.2, 0.2), Box(0.2, 0.1, 0.3, 0.2)
    far = Box(0.8, 0.8, 0.9, 0.9)
    assert len(foveate(GRID, Region((left, right)), None, rule())) == 2
    assert len(foveate(GRID, Region((left, far)), None, rule())) == 3


def test_what_costs_as_much_is_seen_whole() -> None:
    assert foveate(GRID, Region.whole(), None, rule()) == ()
    assert foveate(GRID, SMALL, None, rule(halo=64)) == ()
    assert foveate(GRID, SMALL, None, rule(view=GRID)) == ()


def test_scattered_boxes_are_joined_where_that_costs_least() -> None:
    dots = tuple(Box(x / 8, y / 8, x / 8 + 0.01, y / 8 + 0.01) for x in range(8) for y in range(8))
    pieces = foveate(TokenGrid(400, 400), Region(dots), None, rule())
    assert len(pieces) == 1 + MAX_CROPS
    assert tower_tokens(pieces) < 0.7 * 400 * 400


@given(grids, st.data())
def test_pieces_survive_their_tensors_and_their_json(grid: TokenGrid, data: st.DataObject) -> None:
    row, col = data.draw(st.integers(0, grid.rows - 1)), data.draw(st.integers(0, grid.cols - 1))
    piece = Piece(grid, (0, grid.rows, 0, col + 1), (row, row + 1, col, col + 1))
    assert Piece.from_numbers(piece.as_numbers()) == piece
    assert Piece.from_json(piece.to_json()) == piece


def planned(compression: str, **foveation: int) -> ImagePlan:
    geometry = Qwen2_5VLGeometry.from_configs(
        {"num_hidden_layers": 28}, {"min_pixels": 3136, "max_pixels": 12845056}
    )
    config = CropConfig.from_mapping({"compression": compression, "foveation": foveation})
    request = ImageRequest(SMALL, 0.8, compression, rim=0.05)  # type: ignore[arg-type]
    return Planner(config, geometry).plan_image(request, 1792, 1344)


def test_counts_and_positions_are_those_of_pooling() -> None:
    pooled, foveated = planned("pool"), planned("foveate")
    assert foveated.tokens == pooled.tokens
    assert not pooled.pieces
    assert pooled.tower_tokens == 64 * 48
    assert foveated.tower_tokens == tower_tokens(foveated.pieces) < 0.3 * pooled.tower_tokens
    # As many as a localizer is shown, or as the server says.
    assert 250 < foveated.pieces[0].num_tokens <= 300
    assert planned("foveate", view_tokens=100).pieces[0].num_tokens <= 100


def test_windows_are_those_of_the_tower() -> None:
    """Of 4 x 4 tokens with Qwen2.5-VL's published settings; Qwen2-VL's tower has none."""
    vision = {"window_size": 112, "patch_size": 14, "spatial_merge_size": 2}
    for family, window in ((Qwen2_5VLGeometry, 4), (Qwen2VLGeometry, 1)):
        model = {"num_hidden_layers": 28, "vision_config": vision}
        assert family.from_configs(model, {}).window_tokens == window


NEXT = LlavaNextGeometry(
    AnyResolution(336, 24, LLAVA_NEXT.resolutions, None),
    num_layers=32,
)


def test_only_tiles_that_the_region_touches_are_seen() -> None:
    corner, middle = Region((Box(0.1, 0.1, 0.2, 0.2),)), Region((Box(0.4, 0.1, 0.6, 0.2),))
    whole, tile = NEXT.foveate(672, 672, corner, None, Sight(0, half_rims=True))
    assert (whole, tile.scale, tile.window) == (
        whole_piece(TokenGrid(24, 24)),
        TokenGrid(48, 48),
        (0, 24, 0, 24),
    )
    assert [piece.window for piece in NEXT.foveate(672, 672, middle, None, Sight(0, half_rims=True))[1:]] == [
        (0, 24, 0, 24),
        (0, 24, 24, 48),
    ]
    assert NEXT.foveate(672, 672, Region.whole(), None, Sight(0, half_rims=True)) == ()
    # A rim reaches into other tiles, if it is to be seen at full size.
    wide = corner.widened(0.4)
    assert len(NEXT.foveate(672, 672, corner, wide, Sight(0, half_rims=True))) == 2
    assert NEXT.foveate(672, 672, corner, wide, Sight(0)) == ()


@pytest.mark.parametrize("size", [(672, 672), (500, 400), (300, 900), (1000, 100), (37, 2000)])
@pytest.mark.parametrize("corner", [(0.05, 0.05), (0.9, 0.9), (0.45, 0.55)])
def test_what_is_left_out_shows_neither_the_region_nor_all(
    size: tuple[int, int], corner: tuple[float, float]
) -> None:
    region = Region((Box(*corner, corner[0] + 0.04, corner[1] + 0.04),))
    pieces = NEXT.foveate(*size, region, None, Sight(0))
    unseen = NEXT.unseen(*size, pieces)
    if not pieces:
        assert unseen is None
        return
    assert unseen is not None
    whole, tiles = NEXT.grid(*size).parts  # type: ignore[union-attr]
    assert not unseen[: whole.num_tokens].any()
    layout = NEXT.tiling.tiles(*size)
    scale = min(layout.resolution[1] / size[0], layout.resolution[0] / size[1])
    pixels = [
        ((length - side * scale) / 2, side * scale)
        for length, side in zip(reversed(layout.resolution), size, strict=True)
    ]
    seen = {(piece.window[0] // 24, piece.window[2] // 24) for piece in pieces[1:]}
    rows = unseen[whole.num_tokens :].reshape(tiles.grid.rows, tiles.row_length)
    for (row, col), hidden in np.ndenumerate(rows[:, : tiles.grid.cols]):
        at = [
            margin + length * (start + (place + 0.5) / count * (end - start))
            for (margin, length), (start, end), place, count in zip(
                pixels,
                ((tiles.window.x0, tiles.window.x1), (tiles.window.y0, tiles.window.y1)),
                (col, row),
                (tiles.grid.cols, tiles.grid.rows),
                strict=True,
            )
        ]
        assert hidden == ((int(at[1] / 336), int(at[0] / 336)) not in seen)
    assert (rows[:, -1] == rows[:, :-1].all(axis=1)).all()
    assert not (unseen & NEXT.grid(*size).mask(region))[whole.num_tokens :].any()


@pytest.mark.parametrize("size", [(40, 5000), (7, 500), (1, 3000), (5000, 40), (3000, 1)])
def test_of_a_line_nothing_but_newlines_may_be_left_out(size: tuple[int, int]) -> None:
    crop = {"compression": "foveate", "pruning_rate": 0.3, "foveation": {"unseen_tiles": "left_out"}}
    for box in (Box(0, 0, 1, 0.1), Box(0, 0, 0.1, 1)):
        request = ImageRequest(Region((box,)), 0.3, "foveate")
        planned = Planner(CropConfig.from_mapping(crop), NEXT).plan_image(request, *size)
        unseen = NEXT.unseen(*size, planned.pieces)
        assert unseen is None or not unseen[: 24 * 24].any()


def test_the_budget_is_spent_on_what_is_seen() -> None:
    region = Region((Box(0.1, 0.1, 0.2, 0.2),))
    crop = {"compression": "foveate", "foveation": {"unseen_tiles": "left_out"}}
    for rate, expected in ((0.889, 325), (0.3, 2 * 576 + 24)):
        config = CropConfig.from_mapping({**crop, "pruning_rate": rate})
        plans = Planner(config, NEXT), Planner(CropConfig.from_mapping({**crop, "foveation": {}}), NEXT)
        request = ImageRequest(region, rate, "foveate", rim=0.125)
        left_out, stock = (planner.plan_image(request, 672, 672).tokens for planner in plans)
        assert left_out.num_embeddings == expected
        assert stock.num_embeddings == retained_count(stock.grid.num_tokens, rate) >= expected
        unseen = NEXT.unseen(672, 672, Planner(config, NEXT).plan_image(request, 672, 672).pieces)
        assert unseen is not None
        assert ((left_out.assignment < 0) == unseen).all()
        assert not (stock.assignment < 0).any()


@pytest.mark.parametrize("size", [(672, 672), (500, 400), (300, 900), (1000, 100), (37, 2000)])
def test_padding_of_tiles_is_followed(size: tuple[int, int]) -> None:
    """A dot is in the tile that shows it, and so is its neighbourhood in the whole image's tile."""
    layout = NEXT.tiling.tiles(*size)
    height, width = layout.resolution
    scale = min(width / size[0], height / size[1])
    places = layout.places_in_whole().reshape(layout.scale.rows, layout.scale.cols)
    for x, y in ((0.03, 0.03), (0.5, 0.4), (0.97, 0.9)):
        across = (width - size[0] * scale) / 2 + x * size[0] * scale
        down = (height - size[1] * scale) / 2 + y * size[1] * scale
        (tile,) = layout.touched(Region((Box(x, y, x + 1e-9, y + 1e-9),)))
        row, col = int(down / 336) * 24, int(across / 336) * 24
        assert tile.window == (row, row + 24, col, col + 24)
        seen_row, seen_col = divmod(int(places[int(down / 14), int(across / 14)]), 24)
        assert abs(seen_row - y * 24) < 1 + 14 / (size[1] * scale) * 24
        assert abs(seen_col - x * 24) < 1 + 14 / (size[0] * scale) * 24


@pytest.mark.parametrize("size", [(560, 448), (601, 397), (2000, 3001), (100, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pixels_are_those_of_the_whole_picture_resized(size: tuple[int, int], mode: str) -> None:
    image, side = noise_image(700, *size).convert(mode), 28
    scale = TokenGrid(16, 20)
    piece = Piece(scale, (3, 9, 4, 20), (4, 8, 5, 19))
    # As Pillow resizes a picture, along before down.
    along = image.convert("RGB").resize((20 * side, size[1]), Image.Resampling.BICUBIC)
    whole = along.resize((20 * side, 16 * side), Image.Resampling.BICUBIC)
    expected = whole.crop((4 * side, 3 * side, 20 * side, 9 * side))
    found = pixels_of(image, piece, side, Image.Resampling.BICUBIC)
    assert found.size == expected.size
    difference = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1  # rounding of where the box begins
    assert (difference > 0).mean() < 0.01
