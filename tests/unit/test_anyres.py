# SPDX-License-Identifier: Apache-2.0
"""Grids of images shown whole and in tiles, against transformers' own image processor and unpadding."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlavaNextImageProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vllm_crop.anyres import AnyResolution
from vllm_crop.errors import UnsupportedModelError
from vllm_crop.geometry import TokenGrid

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
]
sides = st.integers(1, 5000)


def tiling(pinpoints: Any = PUBLISHED) -> AnyResolution:
    return AnyResolution.from_settings({}, 336, 24, pinpoints)


@settings(deadline=None, max_examples=500)
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


@settings(deadline=None)
@given(width=sides, height=sides, pinpoints=st.sampled_from([PUBLISHED, NINE]))
def test_no_image_has_more_tokens_than_the_largest(
    width: int, height: int, pinpoints: list[list[int]]
) -> None:
    assert tiling(pinpoints).tokens(width, height).num_tokens <= tiling(pinpoints).max_tokens


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_token_shows_what_its_place_in_the_window_says(width: int, height: int) -> None:
    """A picture of coordinates goes through the image processor; each token's patch is averaged."""
    x = torch.arange(width).expand(height, width) + 0.5
    y = torch.arange(height)[:, None].expand(height, width) + 0.5
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=PUBLISHED,
        do_rescale=False,
        do_normalize=False,
        do_convert_rgb=False,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    )
    picture = torch.stack([x / width, y / height, torch.ones(height, width)])
    (pixels,) = processor(picture, return_tensors="pt")["pixel_values"]
    rows, cols = get_anyres_image_grid_shape((height, width), PUBLISHED, 336)
    joined = pixels[1 : 1 + rows * cols].view(rows, cols, 3, 336, 336).permute(2, 0, 3, 1, 4)
    shown = [pixels[0], joined.reshape(3, rows * 336, cols * 336)]
    patches = [torch.nn.functional.avg_pool2d(one[None], 14)[0] for one in shown]
    patches[1] = unpad_image(patches[1], (height, width))

    for part, patch in zip(tiling().tokens(width, height).parts, patches, strict=True):
        window = part.window
        for row, col in product(range(part.grid.rows), range(part.grid.cols)):
            if patch[2, row, col] < 0.999:  # partly padding
                continue
            at_x = window.x0 + (col + 0.5) * (window.x1 - window.x0) / part.grid.cols
            at_y = window.y0 + (row + 0.5) * (window.y1 - window.y0) / part.grid.rows
            # A third of a token: resizing blurs, most of all at the borders.
            assert abs(float(patch[0, row, col]) - at_x) < 0.34 / part.grid.cols
            assert abs(float(patch[1, row, col]) - at_y) < 0.34 / part.grid.rows


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
    AnyResolution.from_settings(fine, 336, 24, PUBLISHED)
    with pytest.raises(UnsupportedModelError, match=message):
        AnyResolution.from_settings({**fine, **given_settings}, 336, 24, PUBLISHED)


def test_resolutions_of_broken_tiles_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not whole tiles of 336 pixels"):
        tiling([[336, 700]])
