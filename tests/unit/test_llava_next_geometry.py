# SPDX-License-Identifier: Apache-2.0
"""Grids of images shown whole and in tiles, against transformers' own image processor and unpadding."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.llava_next import LLAVA_NEXT, LLAVA_ONEVISION, AnyResolution
from vllm_crop.planning.geometry import TokenGrid

PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NINE = [[336 * rows, 336 * cols] for rows, cols in product((1, 2, 3), (1, 2, 3))]
SIZES = [
    (336, 336),
    (640, 480),
    (480, 640),
    (1280, 720),
    (333, 1000),
    (1001, 334),
    (50, 40),
    (673, 671),
    (97, 311),
    (2000, 500),
    (1500, 1400),
]
sides = st.integers(1, 5000)
UNSCALED: dict[str, Any] = {
    "do_rescale": False,
    "do_normalize": False,
    "do_convert_rgb": False,
    "image_mean": [0, 0, 0],
    "image_std": [1, 1, 1],
}
SQUARE: dict[str, Any] = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_grid_pinpoints": PUBLISHED,
}


def tiling(pinpoints: Any = None) -> AnyResolution:
    return AnyResolution.from_settings({}, LLAVA_NEXT, 336, 24, pinpoints)


def onevision() -> AnyResolution:
    return AnyResolution.from_settings({}, LLAVA_ONEVISION, 384, 27, None)


# With how many tokens a place may be off: resizing blurs, most of all at the borders, and SigLIP's patches
# leave some pixels of a tile out.
PROCESSORS = {
    "next": (LlavaNextImageProcessor(**SQUARE, **UNSCALED), tiling(), 0.34),
    "onevision": (LlavaOnevisionImageProcessor(**UNSCALED), onevision(), 0.6),
}


@given(width=sides, height=sides, pinpoints=st.sampled_from([PUBLISHED, NINE]))
@example(width=3000, height=2, pinpoints=PUBLISHED)  # no row is left
@example(width=2, height=3000, pinpoints=PUBLISHED)  # nothing but newlines is left
@example(width=4999, height=5000, pinpoints=PUBLISHED)
def test_the_tiles_that_are_left_are_those_of_unpad_image(
    width: int, height: int, pinpoints: list[list[int]]
) -> None:
    shape = get_anyres_image_grid_shape((height, width), pinpoints, 336)
    _, rows, cols = unpad_image(torch.empty(1, *(24 * side for side in shape)), (height, width)).shape
    tokens = tiling(pinpoints).tokens(width, height)
    assert tokens.parts[0].grid == TokenGrid(24, 24)
    assert tokens.num_tokens == 24 * 24 + rows * (cols + 1)
    if rows:
        assert tokens.parts[1].grid == TokenGrid(rows, cols)
        assert tokens.parts[1].newlines
    else:
        assert len(tokens.parts) == 1


@given(width=sides, height=sides)
@example(width=1153, height=944)  # the largest that is not scaled down, nearly
@example(width=2304, height=2304)
@example(width=5000, height=60)
def test_more_tokens_than_those_of_nine_tiles_are_scaled_down_as_upstream(width: int, height: int) -> None:
    """`pack_image_features` itself; its only use of the model is the config."""
    config = LlavaOnevisionConfig()
    rows, cols = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, 384)
    features = torch.empty(1 + rows * cols, 27 * 27, 1)
    model = SimpleNamespace(config=config)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model, [features], [(height, width)], image_newline=torch.empty(1)
    )
    tokens = onevision().tokens(width, height)
    assert tokens.num_tokens == len(packed[0]) <= onevision().max_tokens


@given(width=sides, height=sides, pinpoints=st.sampled_from([PUBLISHED, NINE]))
def test_no_image_has_more_tokens_than_the_largest(
    width: int, height: int, pinpoints: list[list[int]]
) -> None:
    assert tiling(pinpoints).tokens(width, height).num_tokens <= tiling(pinpoints).max_tokens
    assert onevision().tokens(width, height).num_tokens <= onevision().max_tokens


def test_defaults_are_those_of_transformers() -> None:
    for known, config, processor in (
        (LLAVA_NEXT, LlavaNextConfig(), LlavaNextImageProcessor()),
        (LLAVA_ONEVISION, LlavaOnevisionConfig(), LlavaOnevisionImageProcessor()),
    ):
        assert [list(pair) for pair in known.resolutions] == config.image_grid_pinpoints
        assert config.image_grid_pinpoints == processor.image_grid_pinpoints
        assert known.size == {key: edge for key, edge in dict(processor.size).items() if edge is not None}
        assert (known.crop_size is None) == (processor.crop_size is None)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("family", ["next", "onevision"])
def test_every_token_shows_what_its_place_in_the_window_says(family: str, width: int, height: int) -> None:
    """A picture of coordinates goes through the image processor; each token's patch is averaged."""
    x = torch.arange(width).expand(height, width) + 0.5
    y = torch.arange(height)[:, None].expand(height, width) + 0.5
    picture = torch.stack([x / width, y / height, torch.ones(height, width)])
    processor, ours, off = PROCESSORS[family]
    side, tokens = ours.tile_pixels, ours.tile_tokens
    (pixels,) = processor(picture, return_tensors="pt")["pixel_values"]
    rows, cols = get_anyres_image_grid_shape((height, width), processor.image_grid_pinpoints, side)

    patches = torch.nn.functional.avg_pool2d(pixels, side // tokens)
    joined = patches[1 : 1 + rows * cols].view(rows, cols, 3, tokens, tokens).permute(2, 0, 3, 1, 4)
    unpadded = unpad_image(joined.reshape(3, rows * tokens, cols * tokens), (height, width))
    for part, shown in zip(ours.tokens(width, height).parts, (patches[0], unpadded), strict=True):
        grid, window = part.grid, part.window
        if (grid.rows, grid.cols) != shown.shape[1:]:  # scaled down
            shown = torch.nn.functional.interpolate(shown[None], [grid.rows, grid.cols], mode="bilinear")[0]
        for row, col in product(range(grid.rows), range(grid.cols)):
            if shown[2, row, col] < 0.999:  # partly padding
                continue
            at_x = window.x0 + (col + 0.5) * (window.x1 - window.x0) / grid.cols
            at_y = window.y0 + (row + 0.5) * (window.y1 - window.y0) / grid.rows
            assert abs(float(shown[0, row, col]) - at_x) < off / grid.cols
            assert abs(float(shown[1, row, col]) - at_y) < off / grid.rows


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"image_grid_pinpoints": NINE}, "image_grid_pinpoints"),
        ({"size": {"shortest_edge": 224}}, "size .* is not the vision tower's image_size, 336"),
        ({"size": {"height": 336, "width": 224}}, "size"),
        ({"crop_size": {"height": 224, "width": 224}}, "crop_size"),
    ],
)
def test_an_image_processor_that_does_not_fit_the_model_is_refused(
    given_settings: dict[str, Any], message: str
) -> None:
    fine = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    AnyResolution.from_settings(fine, LLAVA_NEXT, 336, 24, PUBLISHED)
    with pytest.raises(UnsupportedModelError, match=message):
        AnyResolution.from_settings({**fine, **given_settings}, LLAVA_NEXT, 336, 24, PUBLISHED)


def test_resolutions_of_broken_tiles_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not whole tiles of 336 pixels"):
        tiling([[336, 700]])
