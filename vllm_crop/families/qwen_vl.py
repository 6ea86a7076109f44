# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL: the whole image in as many tokens as its size asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.geometry import Box, ImageView, TokenGrid
from vllm_crop.smart_resize import SmartResize
from vllm_crop.token_grids import ImageTokens


@dataclass(frozen=True)
class Qwen2_5VLGeometry:
    """Qwen2.5-VL: the whole image, resized to whole tokens; M-RoPE numbers rows and columns."""

    uses_mrope: ClassVar[bool] = True
    rotary_room: ClassVar[int] = 4
    default_patch: ClassVar[int] = 14
    default_deepstack: ClassVar[tuple[int, ...]] = ()

    resize: SmartResize
    num_layers: int
    first_eviction_layer: int = 1

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: the two do not fit each other.
        """
        vision = model.get("vision_config") or {}
        patch, merge = vision.get("patch_size", cls.default_patch), vision.get("spatial_merge_size", 2)
        # Published checkpoints of Qwen2.5-VL have the language model's settings at the top level.
        text = model.get("text_config") or model
        # Each of these vision layers adds features to the rows after one of the first decoder layers.
        deepstack = vision.get("deepstack_visual_indexes", cls.default_deepstack)
        resize = SmartResize.from_settings(preprocessor, patch, merge)
        return cls(resize, decoder_layers(text), max(1, len(deepstack)))

    @property
    def max_tokens(self) -> int:
        """Those of the largest area an image keeps."""
        return self.resize.max_tokens

    def grid(self, width: int, height: int) -> TokenGrid:
        """One token for every `token_side` pixels after the resize."""
        return self.resize.grid(width, height)

    def view(self, width: int, height: int) -> ImageView:
        """All of the image."""
        return ImageView(Box(0.0, 0.0, 1.0, 1.0))

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of whole tokens, in which the models of this line speak of places."""
        grid, side = self.grid(width, height), self.resize.token_side
        return grid.cols * side, grid.rows * side

    def position_span(self, grid: ImageTokens) -> int:
        """As many as the longer side has tokens."""
        (part,) = grid.parts
        return max(part.grid.rows, part.grid.cols)


@dataclass(frozen=True)
class Qwen3VLGeometry(Qwen2_5VLGeometry):
    """Qwen3-VL: larger patches, and deepstack."""

    rotary_room: ClassVar[int] = 1
    default_patch: ClassVar[int] = 16
    default_deepstack: ClassVar[tuple[int, ...]] = (8, 16, 24)
