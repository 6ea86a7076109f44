# SPDX-License-Identifier: Apache-2.0
"""The vision towers of the LLaVA families: how many tokens a side of an image has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_crop.errors import UnsupportedModelError


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
            UnsupportedModelError: another tower, or another choice of its features.
        """
        vision = model.get("vision_config") or dict(
            zip(("image_size", "patch_size"), self.whole, strict=True)
        )
        tower = vision.get("model_type", self.model_type)
        if tower != self.model_type:
            raise UnsupportedModelError(
                f"vision tower {tower!r} is not supported: this family needs {self.model_type!r}"
            )
        strategy = model.get("vision_feature_select_strategy", self.strategy)
        if strategy != self.strategy:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} is not supported, only {self.strategy!r}"
            )
        pixels = vision.get("image_size", self.sizes[0])
        return pixels, pixels // vision.get("patch_size", self.sizes[1])


CLIP = VisionTower("clip_vision_model", "default", whole=(336, 14), sizes=(224, 32))
SIGLIP = VisionTower("siglip_vision_model", "full", whole=(384, 14), sizes=(224, 16))
