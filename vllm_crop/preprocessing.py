# SPDX-License-Identifier: Apache-2.0
"""Which part of an image survives preprocessing, from the image processor's settings.

Follows the order of transformers' LlavaImageProcessor and CLIPImageProcessor: pad, resize, centre crop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.geometry import Box, ImageView


@dataclass(frozen=True)
class ClipPreprocessing:
    """The geometry of a CLIP-like image processor; None switches a step off.

    Attributes:
        pads_to_square: extend the short side evenly first (LlavaImageProcessor with `do_pad`).
        shortest_edge: resize so that the short side has this many pixels.
        resize_to: resize to exactly this (height, width), aspect ratio ignored.
        crop: (height, width) cut from, or padded around, the middle.
    """

    pads_to_square: bool
    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    crop: tuple[int, int] | None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Read `preprocessor_config.json`, or the `to_dict()` of a loaded image processor.

        Raises:
            UnsupportedModelError: the settings resize in a way this class does not know.
        """
        shortest_edge, resize_to = None, None
        if settings.get("do_resize", True):
            size = settings.get("size", 224)
            size = {"shortest_edge": size} if isinstance(size, int) else _without_nones(size)
            if "height" in size and "width" in size:
                resize_to = (size["height"], size["width"])
            elif set(size) == {"shortest_edge"}:
                shortest_edge = size["shortest_edge"]
            else:
                raise UnsupportedModelError(f"image processor size {size} is not supported")
        crop = None
        if settings.get("do_center_crop", True):
            crop_size = settings.get("crop_size", 224)
            sides = {"height": crop_size, "width": crop_size} if isinstance(crop_size, int) else crop_size
            crop = (sides["height"], sides["width"])
        # Other image processors know do_pad too; for them it only fills up a batch.
        pads_by_square = str(settings.get("image_processor_type", "")).startswith("LlavaImageProcessor")
        pads_to_square = bool(settings.get("do_pad", False)) and pads_by_square
        return cls(pads_to_square, shortest_edge, resize_to, crop)

    def view(self, width: int, height: int) -> ImageView:
        """The window of an image of this size in pixels that reaches the vision tower."""
        padded_width = padded_height = max(width, height)
        if not self.pads_to_square:
            padded_width, padded_height = width, height
        new_height, new_width = self._resized(padded_width, padded_height)
        crop_height, crop_width = self.crop or (new_height, new_width)
        left, right = _window(padded_width, new_width, crop_width, (padded_width - width) // 2)
        top, bottom = _window(padded_height, new_height, crop_height, (padded_height - height) // 2)
        return ImageView(Box(left / width, top / height, right / width, bottom / height))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.resize_to is not None:
            return self.resize_to
        if self.shortest_edge is None:
            return height, width
        if width <= height:
            return int(self.shortest_edge * height / width), self.shortest_edge
        return self.shortest_edge, int(self.shortest_edge * width / height)


def _window(padded: int, resized: int, crop: int, pad_before: int) -> tuple[float, float]:
    """Start and end of the cropped window along one side, in pixels of the image as sent."""
    offset = int((resized - crop) / 2) if crop <= resized else -((crop - resized) // 2)
    scale = padded / resized
    return offset * scale - pad_before, (offset + crop) * scale - pad_before


def _without_nones(size: Mapping[str, Any]) -> dict[str, int]:
    return {key: value for key, value in size.items() if value is not None}
