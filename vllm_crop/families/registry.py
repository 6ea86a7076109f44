# SPDX-License-Identifier: Apache-2.0
"""The supported families, and how a checkpoint turns an image into a token grid, read from its JSON alone.

FAMILIES has a row for each architecture, this folder a class for each geometry. The server and
`vllm-crop plan` build the same objects, so they make the same plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.gemma4 import Gemma4Geometry
from vllm_crop.families.glm4v import Glm4vGeometry
from vllm_crop.families.internvl import InternVLChatGeometry, InternVLGeometry
from vllm_crop.families.llava import LlavaGeometry
from vllm_crop.families.llava_next import LlavaNextGeometry, LlavaOnevisionGeometry
from vllm_crop.families.mistral3 import Mistral3Geometry
from vllm_crop.families.not_supported import WHY_NOT
from vllm_crop.families.qwen_vl import (
    Qwen2_5VLGeometry,
    Qwen2VLGeometry,
    Qwen3_5Geometry,
    Qwen3VLGeometry,
)
from vllm_crop.planning.budget import check_eviction_layers
from vllm_crop.planning.foveation import Piece, Sight
from vllm_crop.planning.geometry import ImageTokens, ImageView, Mask, Region


class VisionGeometry(Protocol):
    """The grid and the view of any image, for one checkpoint.

    Attributes:
        uses_mrope: position ids are coordinates in the image, which the tokens that are left keep.
        rotary_room: how many times the model's positions vLLM's rotary table holds.
        why_no_regions: why no part of an image can be pruned, only all of it be seen small; empty if one can.
        fewest_tokens: the least that `max_tokens` can bound an image to.
        why_no_foveation: why its vision tower cannot see parts of an image at several sizes; empty if it can.
        foveation_settings: which of FoveationConfig's settings mean something to it.
    """

    uses_mrope: ClassVar[bool]
    rotary_room: ClassVar[int]
    why_no_regions: ClassVar[str]
    fewest_tokens: ClassVar[int]
    why_no_foveation: ClassVar[str]
    foveation_settings: ClassVar[frozenset[str]]

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings, which may be empty.

        Raises:
            UnsupportedModelError: a variant that is not supported, or the two do not fit each other.
        """
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        ...

    @property
    def state_tokens(self) -> int:
        """Of a hybrid: the tokens whose keys and values take as much of a layer as a state; 0 of others."""
        ...

    @property
    def looking_layers(self) -> Sequence[int]:
        """Those of them that look at every earlier token, ascending: heat maps are made of these."""
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

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels of the view of an image of this size, as the model is shown it."""
        ...

    def foveate(
        self, width: int, height: int, region: Region, around: Region | None, sight: Sight
    ) -> tuple[Piece, ...]:
        """What the vision tower is to see of an image of this size, coarse pieces first.

        Args:
            region, around: in fractions of the view, as in `vllm_crop.planning.foveation.foveate`.

        Returns:
            Empty where the whole image at full size costs no more.
        """
        ...

    def small(self, width: int, height: int, max_tokens: int) -> tuple[Piece, ...]:
        """All of an image of this size, small, for as many visual tokens at most.

        Returns:
            One piece; empty where the vision tower cannot see it so small.
        """
        ...

    def overview(self, width: int, height: int) -> tuple[Piece, ...]:
        """The piece of all of the image that its prompt has beside larger ones; empty without one."""
        ...

    def unseen(self, width: int, height: int, pieces: Sequence[Piece]) -> Mask | None:
        """Tokens that are shown by the piece of the whole image alone and in its prompt once more.

        Returns:
            `[num_tokens]`, or None where a token is in no prompt twice.
        """
        ...

    def position_span(self, grid: ImageTokens) -> int:
        """How many position ids an unpruned image takes."""
        ...


@dataclass(frozen=True)
class Family:
    """What a family is, in one place.

    Attributes:
        geometry: how its checkpoints turn an image into tokens.
        module: the file of its model, in vllm_crop/models and in vllm/model_executor/models.
        also: further files there that its model is made of.
        serve_options: of `vllm serve`, without which its published checkpoints do not start.
    """

    geometry: type[VisionGeometry]
    module: str
    also: tuple[str, ...] = ()
    serve_options: tuple[str, ...] = ()

    @property
    def upstream_files(self) -> tuple[str, ...]:
        """The files of vllm/model_executor/models whose shape the family relies on."""
        return self.module, *self.also


FAMILIES = {
    "LlavaForConditionalGeneration": Family(LlavaGeometry, "llava"),
    "LlavaNextForConditionalGeneration": Family(LlavaNextGeometry, "llava_next"),
    "LlavaOnevisionForConditionalGeneration": Family(LlavaOnevisionGeometry, "llava_onevision"),
    "Qwen2VLForConditionalGeneration": Family(Qwen2VLGeometry, "qwen2_vl", ("qwen2",)),
    "Qwen2_5_VLForConditionalGeneration": Family(Qwen2_5VLGeometry, "qwen2_5_vl", ("qwen2",)),
    "Qwen3VLForConditionalGeneration": Family(Qwen3VLGeometry, "qwen3_vl", ("qwen3",)),
    "Qwen3VLMoeForConditionalGeneration": Family(Qwen3VLGeometry, "qwen3_vl_moe", ("qwen3_vl", "qwen3_moe")),
    "Qwen3_5ForConditionalGeneration": Family(Qwen3_5Geometry, "qwen3_5", ("qwen3_vl", "qwen3_next")),
    "Qwen3_5MoeForConditionalGeneration": Family(Qwen3_5Geometry, "qwen3_5", ("qwen3_vl", "qwen3_next")),
    "InternVLForConditionalGeneration": Family(InternVLGeometry, "interns1"),
    "InternVLChatModel": Family(InternVLChatGeometry, "internvl", serve_options=("--trust-remote-code",)),
    # Of a repository with Mistral's own files beside transformers', vLLM would take those.
    "Mistral3ForConditionalGeneration": Family(
        Mistral3Geometry,
        "mistral3",
        serve_options=("--tokenizer-mode", "hf", "--config-format", "hf", "--load-format", "safetensors"),
    ),
    "Glm4vForConditionalGeneration": Family(Glm4vGeometry, "glm4_1v", ("glm4", "llama")),
    "Glm4vMoeForConditionalGeneration": Family(Glm4vGeometry, "glm4_1v", ("glm4_moe",)),
    "Gemma4ForConditionalGeneration": Family(Gemma4Geometry, "gemma4_mm"),
}


def family_of(model: Mapping[str, Any]) -> str:
    """The supported architecture a `config.json` names; our own names for them count too.

    Raises:
        UnsupportedModelError: the first architecture, which is the one vLLM serves, is not supported.
    """
    architectures = model.get("architectures") or []
    family = str(architectures[0]).removeprefix("Crop") if architectures else ""
    if family in WHY_NOT:
        raise UnsupportedModelError(f"{family} is not supported: {WHY_NOT[family]}")
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
    return FAMILIES[family_of(model)].geometry.from_configs(model, preprocessor)


def check_layers_that_evict(geometry: VisionGeometry, eviction_layers: Sequence[int]) -> None:
    """Check that a checkpoint can evict at these layers.

    Raises:
        BudgetError: it cannot.
    """
    check_eviction_layers(eviction_layers, geometry.num_layers, geometry.first_eviction_layer)
