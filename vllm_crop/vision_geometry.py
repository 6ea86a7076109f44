# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint turns an image into a token grid, read from its JSON configuration alone.

One class per model family; FAMILIES is the list of supported architectures. The server and `vllm-crop plan`
build the same objects, so they make the same plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from vllm_crop.anyres import LLAVA_NEXT, LLAVA_ONEVISION, AnyResolution
from vllm_crop.errors import UnsupportedModelError
from vllm_crop.geometry import Box, ImageView, TokenGrid
from vllm_crop.preprocessing import ClipPreprocessing
from vllm_crop.smart_resize import SmartResize
from vllm_crop.token_grids import ImageTokens
from vllm_crop.vision_tower import CLIP, SIGLIP

# transformers' defaults for what a config.json may leave out.
_DEFAULT_LAYERS = {
    **{"llama": 32, "mistral": 32, "qwen2": 32},
    **{"qwen2_5_vl": 80, "qwen2_5_vl_text": 80, "qwen3_vl": 32, "qwen3_vl_text": 32},
    **{"qwen3_vl_moe": 24, "qwen3_vl_moe_text": 24},
}


class VisionGeometry(Protocol):
    """The grid and the view of any image, for one checkpoint.

    Attributes:
        uses_mrope: position ids are coordinates in the image, which the tokens that are left keep.
        rotary_room: how many times the model's positions vLLM's rotary table holds.
    """

    uses_mrope: ClassVar[bool]
    rotary_room: ClassVar[int]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        ...

    @property
    def first_eviction_layer(self) -> int:
        """The first of them that can run with fewer visual tokens."""
        ...

    @property
    def max_tokens(self) -> int:
        """Visual tokens of the largest image: what is settled before any image is seen counts with them."""
        ...

    def grid(self, width: int, height: int) -> ImageTokens:
        """The visual tokens of an image of this size in pixels."""
        ...

    def view(self, width: int, height: int) -> ImageView:
        """The part of an image of this size that the model sees."""
        ...

    def position_span(self, grid: ImageTokens) -> int:
        """How many position ids an unpruned image takes."""
        ...


@dataclass(frozen=True)
class LlavaGeometry:
    """LLaVA-1.5: every image becomes one square grid of CLIP patches after resize and centre crop."""

    uses_mrope: ClassVar[bool] = False
    rotary_room: ClassVar[int] = 1
    first_eviction_layer: ClassVar[int] = 1

    token_grid: TokenGrid
    preprocessing: ClipPreprocessing
    num_layers: int

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: another vision tower than CLIP, or its class token is kept.
        """
        _, side = CLIP.sides(model)
        preprocessing = ClipPreprocessing.from_settings(preprocessor)
        return cls(TokenGrid(side, side), preprocessing, decoder_layers(model.get("text_config") or {}))

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


def decoder_layers(text_config: Mapping[str, Any]) -> int:
    """`num_hidden_layers`, or the default transformers gives this text model."""
    model_type = text_config.get("model_type", "llama")
    layers = text_config.get("num_hidden_layers", _DEFAULT_LAYERS.get(model_type))
    if layers is None:
        raise UnsupportedModelError(f"config.json names no num_hidden_layers for {model_type!r}")
    return int(layers)


FAMILIES: dict[str, type[LlavaGeometry | LlavaNextGeometry | Qwen2_5VLGeometry]] = {
    "LlavaForConditionalGeneration": LlavaGeometry,
    "LlavaNextForConditionalGeneration": LlavaNextGeometry,
    "LlavaOnevisionForConditionalGeneration": LlavaOnevisionGeometry,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5VLGeometry,
    "Qwen3VLForConditionalGeneration": Qwen3VLGeometry,
    "Qwen3VLMoeForConditionalGeneration": Qwen3VLGeometry,
}


def family_of(model: Mapping[str, Any]) -> str:
    """The supported architecture a `config.json` names; our own names for them count too.

    Raises:
        UnsupportedModelError: the first architecture, which is the one vLLM serves, is not supported.
    """
    architectures = model.get("architectures") or []
    family = str(architectures[0]).removeprefix("Crop") if architectures else ""
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"architectures {architectures} are not supported; supported: {sorted(FAMILIES)}"
        )
    return family


def geometry_from_configs(model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionGeometry:
    """The geometry of the family that `config.json` names.

    Raises:
        UnsupportedModelError: no supported family, or a variant of one that is not supported.
    """
    return FAMILIES[family_of(model)].from_configs(model, preprocessor)
