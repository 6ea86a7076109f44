# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: tiles of one size, one or several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vllm_crop.families.anyres import LLAVA_NEXT, LLAVA_ONEVISION, AnyResolution
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.families.vision_tower import CLIP, SIGLIP
from vllm_crop.geometry import Box, ImageView, TokenGrid
from vllm_crop.preprocessing import ClipPreprocessing
from vllm_crop.token_grids import ImageTokens


@dataclass(frozen=True)
class LlavaGeometry:
    """LLaVA-1.5: every image becomes one square grid of CLIP patches after resize and centre crop."""

    uses_mrope: ClassVar[bool] = False
    rotary_room: ClassVar[int] = 1
    first_eviction_layer: ClassVar[int] = 1

    token_grid: TokenGrid
    preprocessing: ClipPreprocessing
    num_layers: int
    image_side: int = 336

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than CLIP, or its class token is kept.
        """
        pixels, side = CLIP.sides(model)
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

    def position_span(self, grid: ImageTokens) -> int:
        """One per token."""
        return grid.num_tokens


@dataclass(frozen=True)
class LlavaNextGeometry:
    """LLaVA-NeXT: the whole image in one square tile, then larger in several, each row with a newline."""

    uses_mrope: ClassVar[bool] = False
    rotary_room: ClassVar[int] = 1
    first_eviction_layer: ClassVar[int] = 1

    tiling: AnyResolution
    num_layers: int

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than CLIP, its class token is kept, or the two do not
                fit each other.
        """
        pinpoints = model.get("image_grid_pinpoints")
        tiling = AnyResolution.from_settings(preprocessor, LLAVA_NEXT, *CLIP.sides(model), pinpoints)
        return cls(tiling, decoder_layers(model.get("text_config") or {}))

    @property
    def max_tokens(self) -> int:
        """Those of an image that fills a resolution."""
        return self.tiling.max_tokens

    def grid(self, width: int, height: int) -> ImageTokens:
        """The tile of the whole image, then the grid of the others without their padding."""
        return self.tiling.tokens(width, height)

    def view(self, width: int, height: int) -> ImageView:
        """All of the image."""
        return ImageView(Box(0.0, 0.0, 1.0, 1.0))

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of the image: the model sees it in several sizes at once."""
        return width, height

    def position_span(self, grid: ImageTokens) -> int:
        """One per token."""
        return grid.num_tokens


class LlavaOnevisionGeometry(LlavaNextGeometry):
    """LLaVA-OneVision: the same with SigLIP's tiles, whose grid is scaled down where there are too many."""

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than SigLIP, not all of its features, or the two do
                not fit each other.
        """
        pinpoints = model.get("image_grid_pinpoints")
        tiling = AnyResolution.from_settings(preprocessor, LLAVA_ONEVISION, *SIGLIP.sides(model), pinpoints)
        return cls(tiling, decoder_layers({"model_type": "qwen2", **(model.get("text_config") or {})}))
