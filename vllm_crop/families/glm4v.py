# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, 4.5V and 4.6V: the whole image in as many tokens as its size asks for, as in the Qwen-VL line.

Sizes follow transformers' Glm4vImageProcessor and Glm46VImageProcessor, which share their smart_resize.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.qwen_vl import Qwen2_5VLGeometry, SmartResize
from vllm_crop.planning.geometry import TokenGrid

_MODEL_TYPES = ("glm4v", "glm4v_moe")
_DEFAULT_FRAMES = 2  # that one patch shows


@dataclass(frozen=True)
class Glm4vResize(SmartResize):
    """An image counts as all the frames of a video that one patch shows."""

    default_size: ClassVar[Mapping[str, int]] = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], patch: int, merge: int) -> Self:
        """Read them as SmartResize does.

        Raises:
            UnsupportedModelError: they bound the area under names that this image processor ignores, too.
        """
        for name in ("min_pixels", "max_pixels"):
            if settings.get(name) is not None:
                raise UnsupportedModelError(
                    f"{name}={settings[name]} means nothing to GLM-4V's image processor: give size both "
                    "shortest_edge and longest_edge"
                )
        resize = super().from_settings(settings, patch, merge)
        return replace(resize, frames=settings.get("temporal_patch_size", _DEFAULT_FRAMES))

    def grid(self, width: int, height: int) -> TokenGrid:
        """The visual tokens of an image of this size in pixels; one narrower than a token is enlarged first.

        Raises:
            UnsupportedImageError: one side is more than 200 times the other, as the image processor says.
        """
        side = self.token_side
        if min(width, height) < side:
            scale = max(side / height, side / width)
            width, height = int(width * scale), int(height * scale)
        return super().grid(width, height)


@dataclass(frozen=True)
class Glm4vGeometry(Qwen2_5VLGeometry):
    """GLM-4V, dense or with experts: every layer of the vision tower attends to the whole image."""

    resizing: ClassVar[type[SmartResize]] = Glm4vResize
    default_window: ClassVar[int] = 0

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: the two do not fit each other, or are of another model with these classes.
        """
        kind = model.get("model_type", _MODEL_TYPES[0])
        if kind not in _MODEL_TYPES:  # vLLM serves some with another image processor
            raise UnsupportedModelError(
                f"model_type {kind!r} is not supported, only {', '.join(_MODEL_TYPES)}"
            )
        vision = model.get("vision_config") or {}
        frames, found = (of.get("temporal_patch_size", _DEFAULT_FRAMES) for of in (vision, preprocessor))
        if preprocessor and found != frames:
            raise UnsupportedModelError(
                f"the image processor's temporal_patch_size {found} is not that of the vision tower, {frames}"
            )
        return super().from_configs(model, preprocessor)
