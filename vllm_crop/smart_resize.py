# SPDX-License-Identifier: Apache-2.0
"""Which token grid an image gets from a processor that resizes it to whole visual tokens (Qwen-VL).

Follows transformers' Qwen2VLImageProcessor and its smart_resize.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm_crop.errors import UnsupportedImageError, UnsupportedModelError
from vllm_crop.geometry import TokenGrid

_MAX_ASPECT_RATIO = 200
_DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_DEFAULT_PATCH, _DEFAULT_MERGE = 14, 2


@dataclass(frozen=True)
class SmartResize:
    """The geometry of a Qwen2VLImageProcessor.

    Attributes:
        token_side: pixels of a visual token's side after the resize.
        min_pixels: smaller images are enlarged to about this area.
        max_pixels: larger ones are reduced to at most this area.
    """

    token_side: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], patch: int, merge: int) -> Self:
        """Read `preprocessor_config.json`, or the `to_dict()` of a loaded image processor.

        Args:
            settings: empty where they are not known: transformers' default sizes then.
            patch: the vision tower's `patch_size`.
            merge: its `spatial_merge_size`.

        Raises:
            UnsupportedModelError: the settings do not fit the vision tower, or do not resize.
        """
        if settings:
            found = settings.get("patch_size", _DEFAULT_PATCH), settings.get("merge_size", _DEFAULT_MERGE)
            if found != (patch, merge):
                raise UnsupportedModelError(
                    f"the image processor's patch_size and merge_size {found} are not those of the vision "
                    f"tower, {(patch, merge)}"
                )
        if not settings.get("do_resize", True):
            raise UnsupportedModelError("do_resize=false is not supported: images must have whole tokens")
        size = settings.get("size") or _DEFAULT_SIZE
        edges = []
        for pixels, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = settings.get(pixels)
            value = size.get(edge) if value is None else value
            if not value:
                raise UnsupportedModelError(f"image processor size {dict(size)} has no {edge!r}")
            edges.append(int(value))
        return cls(patch * merge, *edges)

    @classmethod
    def of_processor(cls, image_processor: Any) -> Self:
        """That of a loaded image processor."""
        patch, merge = image_processor.patch_size, image_processor.merge_size
        return cls.from_settings(image_processor.to_dict(), patch, merge)

    @property
    def min_tokens(self) -> int:
        """Visual tokens of the smallest image."""
        return math.ceil(self.min_pixels / self.token_side**2)

    @property
    def max_tokens(self) -> int:
        """Visual tokens of the largest image."""
        return self.max_pixels // self.token_side**2

    def grid(self, width: int, height: int) -> TokenGrid:
        """The visual tokens of an image of this size in pixels.

        Raises:
            UnsupportedImageError: one side is more than 200 times the other, as the image processor says.
        """
        ratio = max(width, height) / min(width, height)
        if ratio > _MAX_ASPECT_RATIO:
            raise UnsupportedImageError(
                f"absolute aspect ratio must be smaller than {_MAX_ASPECT_RATIO}, got {ratio}"
            )
        side = self.token_side
        rows, cols = round(height / side), round(width / side)
        if rows * cols * side**2 > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / scale / side))
            cols = max(1, math.floor(width / scale / side))
        elif rows * cols * side**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, cols = math.ceil(height * scale / side), math.ceil(width * scale / side)
        return TokenGrid(rows, cols)
