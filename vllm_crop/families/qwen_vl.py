# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: the whole image in as many tokens as its size asks for.

Sizes follow transformers' Qwen2VLImageProcessor and its smart_resize.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vllm_crop.errors import UnsupportedImageError, UnsupportedModelError
from vllm_crop.families.text_layers import decoder_layers, full_attention_layers, state_tokens
from vllm_crop.families.view_size import size_for_tokens, small_scale
from vllm_crop.planning.foveation import FoveationRule, Piece, Sight, foveate, whole_piece
from vllm_crop.planning.geometry import Box, ImageTokens, ImageView, Region, TokenGrid

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
        frames: how often the area of an image counts against both.
    """

    default_size: ClassVar[Mapping[str, int]] = _DEFAULT_SIZE

    token_side: int
    min_pixels: int
    max_pixels: int
    frames: int = 1

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
        size = settings.get("size") or cls.default_size
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
        return math.ceil(self.min_pixels / (self.frames * self.token_side**2))

    @property
    def max_tokens(self) -> int:
        """Visual tokens of the largest image."""
        return self.max_pixels // (self.frames * self.token_side**2)

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
        side, area = self.token_side, self.frames * height * width
        rows, cols = round(height / side), round(width / side)
        if self.frames * rows * cols * side**2 > self.max_pixels:
            scale = math.sqrt(area / self.max_pixels)
            rows = max(1, math.floor(height / scale / side))
            cols = max(1, math.floor(width / scale / side))
        elif self.frames * rows * cols * side**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / area)
            rows, cols = math.ceil(height * scale / side), math.ceil(width * scale / side)
        return TokenGrid(rows, cols)


@dataclass(frozen=True)
class Qwen2_5VLGeometry:
    """Qwen2.5-VL: the whole image, resized to whole tokens; M-RoPE numbers rows and columns."""

    uses_mrope: ClassVar[bool] = True
    resizing: ClassVar[type[SmartResize]] = SmartResize
    rotary_room: ClassVar[int] = 4
    default_patch: ClassVar[int] = 14
    default_deepstack: ClassVar[tuple[int, ...]] = ()
    default_window: ClassVar[int] = 112
    why_no_regions: ClassVar[str] = ""
    fewest_tokens: ClassVar[int] = 1
    why_no_foveation: ClassVar[str] = ""
    foveation_settings: ClassVar[frozenset[str]] = frozenset({"view_tokens", "rim_size", "reuse", "halo"})

    resize: SmartResize
    num_layers: int
    first_eviction_layer: int = 1
    # Along the side of a window that most layers of the vision tower attend within.
    window_tokens: int = 1

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
        resize = cls.resizing.from_settings(preprocessor, patch, merge)
        window = vision.get("window_size", cls.default_window) if cls.default_window else 0
        window_tokens = max(1, window // (patch * merge))
        return cls(resize, decoder_layers(text), max(1, len(deepstack)), window_tokens)

    @property
    def state_tokens(self) -> int:
        """None: no layer has a state."""
        return 0

    @property
    def looking_layers(self) -> Sequence[int]:
        """All."""
        return range(self.num_layers)

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

    def foveate(
        self, width: int, height: int, region: Region, around: Region | None, sight: Sight
    ) -> tuple[Piece, ...]:
        """Small the whole image, and at full size what is around the region."""
        size = size_for_tokens(self, width, height, sight.view_tokens)
        if size is None:
            return ()
        rule = FoveationRule(self.grid(*size), sight.halo, self.window_tokens, sight.half_rims)
        return foveate(self.grid(width, height), region, around, rule)

    def small(self, width: int, height: int, max_tokens: int) -> tuple[Piece, ...]:
        """The image resized, unless the image processor would enlarge it again."""
        scale, side = small_scale(self.grid(width, height), max_tokens), self.resize.token_side
        kept = self.grid(scale.cols * side, scale.rows * side) == scale
        return (whole_piece(scale),) if kept else ()

    def overview(self, width: int, height: int) -> tuple[Piece, ...]:
        """None: the prompt has an image once."""
        return ()

    def unseen(self, width: int, height: int, pieces: Sequence[Piece]) -> None:
        """None: the whole image is seen at one size in the prompt."""

    def position_span(self, grid: ImageTokens) -> int:
        """As many as the longer side has tokens."""
        (part,) = grid.parts
        return max(part.grid.rows, part.grid.cols)


@dataclass(frozen=True)
class Qwen2VLGeometry(Qwen2_5VLGeometry):
    """Qwen2-VL: every layer of the vision tower attends to the whole image."""

    default_window: ClassVar[int] = 0


@dataclass(frozen=True)
class Qwen3VLGeometry(Qwen2_5VLGeometry):
    """Qwen3-VL: larger patches, and deepstack; no windows either."""

    default_window: ClassVar[int] = 0
    rotary_room: ClassVar[int] = 1
    default_patch: ClassVar[int] = 16
    default_deepstack: ClassVar[tuple[int, ...]] = (8, 16, 24)


@dataclass(frozen=True)
class Qwen3_5Geometry(Qwen3VLGeometry):
    """Qwen3.5, 3.6 and 3.8: Qwen3-VL's vision tower without deepstack; every fourth layer looks."""

    default_deepstack: ClassVar[tuple[int, ...]] = ()

    full_attention: tuple[int, ...] = ()
    tokens_of_a_state: int = 0

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: the two do not fit each other, or there is deepstack.
        """
        found = super().from_configs(model, preprocessor)
        if found.first_eviction_layer > 1:
            raise UnsupportedModelError(
                "vision_config.deepstack_visual_indexes is not supported for this family, no released "
                "checkpoint of which has it"
            )
        looking = tuple(full_attention_layers(model, found.num_layers))
        return replace(found, full_attention=looking, tokens_of_a_state=state_tokens(model))

    @property
    def state_tokens(self) -> int:
        """Those of a Gated DeltaNet."""
        return self.tokens_of_a_state

    @property
    def looking_layers(self) -> Sequence[int]:
        """Every fourth."""
        return self.full_attention
