# SPDX-License-Identifier: Apache-2.0
"""CropConfig: what the operator of a server decides, `additional_config["crop"]`."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vllm_crop.budget import Method, method_evicts
from vllm_crop.errors import UnsupportedFlagError
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.plan import Compression

PositionIds = Literal["renumbered", "original"]

CONFIG_KEY = "crop"
MAX_STAGES = 4  # each one is a KV cache group of its own
DEFAULT_STAGES = (2,)
LONGEST_KEY = 40  # an unknown key comes from the client and may be a megabyte long


class CropLimits(BaseModel):
    """What one request may ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_pruning_rate: float = Field(
        default=0.99, ge=0, lt=1, description="Largest pruning_rate a request may ask for, in [0, 1)."
    )
    max_boxes_per_image: int = Field(
        default=16, ge=1, description="Most boxes a request may send for one image."
    )


class CropConfig(BaseModel):
    """Settings of a server, the same for all its requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Method = Field(
        default="plc",
        description="What is done to requests that do not say: 'plc' compresses visual tokens before the "
        "language model; 'ilp' evicts them inside it, at eviction_layers; 'plc+ilp' does both; 'off' serves "
        "them as they are.",
    )
    pruning_rate: float = Field(
        default=0.778,
        ge=0,
        lt=1,
        description="Fraction of an image's visual tokens to remove, averaged over layers, in [0, 1). "
        "0.667 / 0.778 / 0.889 leave 192 / 128 / 64 of LLaVA-1.5's 576.",
    )
    eviction_layers: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        max_length=MAX_STAGES,
        description="Decoder layers, ascending, from which on fewer visual tokens are seen: what the server "
        f"prepares for, so that requests can ask for 'ilp' and 'plc+ilp'. At most {MAX_STAGES}. Left out: "
        f"{list(DEFAULT_STAGES)} if method is one of these two, else none.",
    )
    compression: Compression = Field(
        default="pool",
        description="What 'plc' makes of tokens outside the region: 'pool' averages patches of them, "
        "'prune' keeps one token of each patch.",
    )
    position_ids: PositionIds | None = Field(
        default=None,
        description="'renumbered' numbers the remaining tokens through; 'original' keeps the position ids "
        "they have in the unpruned prompt. Left out: 'original' for models with M-RoPE, whose ids are "
        "coordinates and know no other way, else 'renumbered'.",
    )
    vit_cache_mib: int = Field(
        default=256,
        ge=0,
        description="Memory for vision features, so that another question about an image runs no vision "
        "tower. MiB per worker; 0 switches it off.",
    )
    limits: CropLimits = Field(default=CropLimits(), description="What one request may ask for.")
    localizer: LocalizerConfig = Field(
        default=LocalizerConfig(), description="Who finds the region of a question that comes without one."
    )

    @field_validator("eviction_layers")
    @classmethod
    def _check_eviction_layers(cls, layers: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if layers is None:
            return None
        if any(one >= other for one, other in pairwise(layers)):
            raise ValueError(f"layers must be strictly ascending, got {layers}")
        method = info.data.get("method", "off")  # absent if it is wrong itself
        if not layers and method_evicts(method):
            raise ValueError(f"method {method!r} needs at least one layer, such as [2], got []")
        return layers

    @property
    def stages(self) -> tuple[int, ...]:
        """The eviction layers the server prepares for; empty if it serves no eviction."""
        if self.eviction_layers is not None:
            return tuple(self.eviction_layers)
        return DEFAULT_STAGES if method_evicts(self.method) else ()

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Validate `additional_config["crop"]`.

        Raises:
            UnsupportedFlagError: naming every wrong key, its value and what is allowed.
        """
        if not isinstance(settings, Mapping):
            raise UnsupportedFlagError(
                f"additional_config.{CONFIG_KEY} must be an object, got {shorten(settings)}"
            )
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise UnsupportedFlagError(describe_errors(error, "additional_config.crop", cls)) from None


def describe_errors(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    """One sentence per wrong field of `model`: where it is, what is allowed, what was given (shortened)."""
    sentences = []
    for detail in error.errors(include_url=False):
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part[:LONGEST_KEY]}" for part in detail["loc"]
        )
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = f"unknown key, allowed are {', '.join(_keys_at(model, detail['loc'][:-1]))}"
        given = "" if detail["type"] in ("missing", "value_error") else f", got {shorten(detail['input'])}"
        sentences.append(f"{prefix}{place}: {message}{given}")
    return "; ".join(sentences[:5])


def _keys_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    for part in place:
        nested = model.model_fields[str(part)].annotation
        assert isinstance(nested, type)
        assert issubclass(nested, BaseModel)
        model = nested
    return list(model.model_fields)


def shorten(value: object, length: int = 60) -> str:
    """A value for an error message, never longer than `length`."""
    if isinstance(value, str):
        value = value[: length + 1]
    elif isinstance(value, list | dict) and len(value) > length:
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except RecursionError:
        text = f"deeply nested {type(value).__name__}"
    return text if len(text) <= length else text[: length - 3] + "..."
