# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: every image in one square grid; and what all LLaVAs share, their vision towers.

The image processor's steps follow transformers' LlavaImageProcessor and CLIPImageProcessor: pad, resize,
centre crop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.plain import PlainText, SeenWhole
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.planning.geometry import Box, ImageView, TokenGrid


@dataclass(frozen=True)
class VisionTower:
    """The vision tower of a LLaVA family.

    Attributes:
        model_type, strategy: its type and `vision_feature_select_strategy`, the defaults and all we know.
        whole: image and patch size in pixels where config.json has no `vision_config`.
        sizes: those left out of a `vision_config`.
    """

    model_type: str
    strategy: str
    whole: tuple[int, int]
    sizes: tuple[int, int]

    def sides(self, model: Mapping[str, Any]) -> tuple[int, int]:
        """Pixels and tokens along the side of an image.

        Raises:
            UnsupportedModelError: another choice of its features.
        """
        vision = model.get("vision_config") or dict(
            zip(("image_size", "patch_size"), self.whole, strict=True)
        )
        strategy = model.get("vision_feature_select_strategy", self.strategy)
        if strategy != self.strategy:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} is not supported with a {self.model_type}, "
                f"only {self.strategy!r}"
            )
        pixels = vision.get("image_size", self.sizes[0])
        return pixels, pixels // vision.get("patch_size", self.sizes[1])


CLIP = VisionTower("clip_vision_model", "default", whole=(336, 14), sizes=(224, 32))
SIGLIP = VisionTower("siglip_vision_model", "full", whole=(384, 14), sizes=(224, 16))


def tower_of(model: Mapping[str, Any], *known: VisionTower) -> VisionTower:
    """The vision tower of a `config.json`; the first of those known where it names none.

    Raises:
        UnsupportedModelError: another one.
    """
    found = (model.get("vision_config") or {}).get("model_type", known[0].model_type)
    for tower in known:
        if tower.model_type == found:
            return tower
    names = " or ".join(repr(tower.model_type) for tower in known)
    raise UnsupportedModelError(f"vision tower {found!r} is not supported: this family needs {names}")


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
        # SiglipImageProcessor has no such step, and its settings no such key.
        has_crop = not str(settings.get("image_processor_type", "")).startswith("SiglipImageProcessor")
        crop = None
        if settings.get("do_center_crop", has_crop):
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


@dataclass(frozen=True)
class LlavaGeometry(PlainText, SeenWhole):
    """LLaVA-1.5: every image becomes one square grid of patches after resize and, for CLIP, centre crop."""

    why_no_foveation: ClassVar[str] = "every image is one tile of a fixed size"

    token_grid: TokenGrid
    preprocessing: ClipPreprocessing
    num_layers: int
    image_side: int = 336

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than CLIP or SigLIP, or other features of it.
        """
        pixels, side = tower_of(model, CLIP, SIGLIP).sides(model)
        preprocessing = ClipPreprocessing.from_settings(preprocessor)
        layers = decoder_layers(model.get("text_config") or {})
        return cls(TokenGrid(side, side), preprocessing, layers, pixels)

    @property
    def max_tokens(self) -> int:
        """Those of every image."""
        return self.token_grid.num_tokens

    def grid(self, width: int, height: int) -> TokenGrid:
        """The same grid for every image."""
        return self.token_grid

    def view(self, width: int, height: int) -> ImageView:
        """The centre crop."""
        return self.preprocessing.view(width, height)

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of the vision tower's input."""
        return self.image_side, self.image_side
