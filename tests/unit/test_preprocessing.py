# SPDX-License-Identifier: Apache-2.0
"""The predicted view against what transformers' image processors do to pictures of coordinates."""

from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.llava import ClipPreprocessing
from vllm_crop.planning.geometry import Box

# Pixel values stay coordinates, and padding is zero.
UNSCALED = {
    "do_convert_rgb": False,
    "do_rescale": False,
    "do_normalize": False,
    "image_mean": [0, 0, 0],
    "image_std": [1, 1, 1],
}
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PROCESSORS: dict[str, tuple[type, dict[str, Any]]] = {
    "clip": (CLIPImageProcessor, SQUARE),
    "llava": (LlavaImageProcessor, SQUARE),
    "llava-padded": (LlavaImageProcessor, {**SQUARE, "do_pad": True}),
    "llava-padded-unresized": (
        LlavaImageProcessor,
        {"do_pad": True, "do_resize": False, "crop_size": {"height": 225, "width": 224}},
    ),
    "siglip": (SiglipImageProcessor, {"size": {"height": 384, "width": 384}}),
    "unresized": (CLIPImageProcessor, {"do_resize": False, "crop_size": {"height": 224, "width": 180}}),
    "exact-size": (CLIPImageProcessor, {"size": {"height": 224, "width": 200}, "do_center_crop": False}),
    "exact-size-then-crop": (CLIPImageProcessor, {"size": {"height": 250, "width": 301}, "crop_size": 224}),
    "shortest-edge-uncropped": (
        CLIPImageProcessor,
        {"size": {"shortest_edge": 100}, "do_center_crop": False},
    ),
    "crop-beyond-the-resized-image": (
        CLIPImageProcessor,
        {"size": {"shortest_edge": 101}, "crop_size": 224},
    ),
}
SIZES = [
    (336, 336),
    (640, 480),
    (480, 640),
    (1280, 720),
    (337, 335),
    (335, 338),
    (1000, 333),
    (101, 999),
    (223, 225),
    (180, 101),
    (50, 40),
    (41, 57),
    (300, 20),
]


def coordinates(width: int, height: int) -> torch.Tensor:
    """`[3, height, width]`: each pixel's x, its y, and 1 where there is an image at all."""
    x = (torch.arange(width) + 0.5).expand(height, width)
    y = (torch.arange(height) + 0.5)[:, None].expand(height, width)
    return torch.stack([x, y, torch.ones(height, width)])


def check_axis(seen: torch.Tensor, image: torch.Tensor, start: float, end: float, size: int) -> None:
    """Compare one line through the middle of the processed picture with the window `[start, end)`.

    Args:
        seen: `[pixels]`, source coordinates as they came out.
        image: `[pixels]`, 1 where the source image is, 0 in padding.
        start: predicted first source coordinate, in pixels.
        end: predicted last one.
        size: source pixels along this axis.
    """
    scale = (end - start) / len(seen)  # source pixels per output pixel
    predicted = start + (torch.arange(len(seen)) + 0.5) * scale
    # Resampling reproduces a ramp exactly except within its reach of the image's border.
    reach = 2 * max(scale, 1.0) + 1
    inner = (predicted > reach) & (predicted < size - reach)
    torch.testing.assert_close(seen[inner], predicted[inner], rtol=0, atol=0.05 * scale)

    visible = image > 0.5
    inside = (predicted > 0) & (predicted < size)
    assert (visible != inside).sum() <= 2, "the image does not end where the window says"
    first_and_last = [0, -1]
    at_edges = (seen / image)[visible][first_and_last]
    torch.testing.assert_close(at_edges, predicted[visible][first_and_last], rtol=0, atol=max(1.5, scale))


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_view_is_the_window_that_the_image_processor_shows(name: str, width: int, height: int) -> None:
    processor_class, settings = PROCESSORS[name]
    processor = processor_class(**settings, **UNSCALED)
    pixels = processor(coordinates(width, height), return_tensors="pt")["pixel_values"][0]
    window = ClipPreprocessing.from_settings(processor.to_dict()).view(width, height).window

    middle_row, middle_col = pixels.shape[1] // 2, pixels.shape[2] // 2
    across, down = pixels[:, middle_row, :], pixels[:, :, middle_col]
    check_axis(across[0], across[2], window.x0 * width, window.x1 * width, width)
    check_axis(down[1], down[2], window.y0 * height, window.y1 * height, height)


def test_view_of_a_clip_processor_that_pads_its_batch_is_the_centre_crop() -> None:
    processor = CLIPImageProcessor(**SQUARE, **UNSCALED, do_pad=True)
    pixels = processor(coordinates(640, 480), return_tensors="pt")["pixel_values"][0]
    window = ClipPreprocessing.from_settings(processor.to_dict()).view(640, 480).window
    check_axis(pixels[0, 168], pixels[2, 168], window.x0 * 640, window.x1 * 640, 640)


def test_view_of_llava_is_the_centre_square() -> None:
    llava = ClipPreprocessing.from_settings(SQUARE)
    assert llava.view(640, 480).window == Box(0.125, 0.0, 0.875, 1.0)
    assert llava.view(480, 640).window == Box(0.0, 0.125, 1.0, 0.875)
    assert llava.view(336, 336).window == Box(0.0, 0.0, 1.0, 1.0)


def test_view_of_a_padded_llava_reaches_beyond_the_short_side() -> None:
    settings = {**SQUARE, "do_pad": True, "image_processor_type": "LlavaImageProcessorFast"}
    padded = ClipPreprocessing.from_settings(settings)
    assert padded.view(672, 336).window == Box(0.0, -0.5, 1.0, 1.5)
    assert padded.view(336, 672).window == Box(-0.5, 0.0, 1.5, 1.0)


@pytest.mark.parametrize("size", [336, {"shortest_edge": 336}, {"shortest_edge": 336, "longest_edge": None}])
@pytest.mark.parametrize("crop_size", [336, {"height": 336, "width": 336}])
def test_sizes_may_be_written_as_numbers_or_objects(size: Any, crop_size: Any) -> None:
    settings = {"size": size, "crop_size": crop_size}
    assert ClipPreprocessing.from_settings(settings) == ClipPreprocessing(False, 336, None, (336, 336))


def test_missing_settings_are_those_of_transformers() -> None:
    written_out = ClipPreprocessing.from_settings(CLIPImageProcessor().to_dict())
    assert ClipPreprocessing.from_settings({}) == written_out


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 336, "longest_edge": 1000}, {"longest_edge": 336}, {"max_height": 3}, {}]
)
def test_unknown_ways_of_resizing_are_refused(size: dict[str, int]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"size .* is not supported"):
        ClipPreprocessing.from_settings({"size": size})


def test_settings_of_steps_that_are_switched_off_do_not_matter() -> None:
    settings = {"do_resize": False, "size": {"max_height": 3}, "do_center_crop": False, "crop_size": 5}
    preprocessing = ClipPreprocessing.from_settings(settings)
    assert preprocessing == ClipPreprocessing(False, None, None, None)
    assert preprocessing.view(300, 200).window == Box(0.0, 0.0, 1.0, 1.0)
