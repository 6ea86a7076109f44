# SPDX-License-Identifier: Apache-2.0
"""CropConfig: what the operator of a server decides, `additional_config["crop"]`."""

import itertools
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vllm_crop.compression.settings import ResamplerConfig
from vllm_crop.errors import InvalidConfigError
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.planning.budget import Method, method_evicts
from vllm_crop.planning.image_budgets import MOST_TOKENS, History
from vllm_crop.planning.plan import Compression

PositionIds = Literal["renumbered", "original"]
Fit = Literal["refuse", "prune"]

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
    min_tokens: int = Field(
        default=0,
        ge=0,
        le=MOST_TOKENS,
        description="Smallest max_tokens a request may ask for; with 0 it may ask for images not to be seen.",
    )
    max_tokens_per_request: int | None = Field(
        default=None,
        ge=1,
        description="Most visual tokens that all images of one request may take in its prompt; more are "
        "pruned or refused, as `fit` says. Left out: as many as the prompt has room for.",
    )
    named_images_mib: int = Field(
        default=128,
        ge=0,
        description="Memory for images that came with a `uuid`, as they were sent, so that the uuid alone "
        "can ask about another region. MiB per API server.",
    )


class FoveationConfig(BaseModel):
    """What the vision tower sees of an image whose region is known; for compression 'foveate'."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    view_tokens: int | None = Field(
        default=None,
        ge=4,
        description="Most visual tokens that the whole image is seen in. Left out: as many as the localizer "
        "is shown (localizer.thumbnail_tokens), so that one view serves both.",
    )
    rim_size: Literal["half", "full"] = Field(
        default="full",
        description="How large the vision tower sees the rim around a region: at 'full' size as the region "
        "itself, or at 'half' the size where that costs less.",
    )
    reuse: Literal["same", "larger"] = Field(
        default="same",
        description="Which cached features of a part of an image may answer: those of the 'same' part, or "
        "also those of a 'larger' one that holds it, which spares the vision tower more, but lets an answer "
        "depend a little on what others have asked about the same image before.",
    )
    unseen_tiles: Literal["from_whole", "left_out"] = Field(
        default="from_whole",
        description="LLaVA-NeXT and OneVision: what becomes of the tokens of tiles that do not show the "
        "region. They are taken 'from_whole', the tile of the whole image, and an image has as many "
        "embeddings as with 'pool'; or 'left_out': the budget is spent on what is seen, at most all of it.",
    )
    halo: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Visual tokens around a region and its rim that are encoded with them and thrown away: "
        "what the outermost tokens see of their neighbourhood.",
    )


class ShadowConfig(BaseModel):
    """How many pruned requests are looked at once more without pruning, and what that may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of pruned requests that are checked; 0 checks none."
    )
    max_running: int = Field(
        default=1, ge=1, le=64, description="Checks at once in one API server; the others wait their turn."
    )
    max_held: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Drawn requests, checks that run among them, whose images one API server keeps until "
        "they are checked. Further ones are dropped and counted.",
    )
    timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=600,
        description="Seconds that the engine may take for each of a check's two requests.",
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
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MOST_TOKENS,
        description="Most visual tokens of an image, in place of a pruning_rate: also of one without a "
        "region. With 'plc' that is what it takes in the prompt, with eviction the average over layers.",
    )
    detail_low_tokens: int = Field(
        default=85,
        ge=1,
        le=MOST_TOKENS,
        description="Visual tokens of an image that a client sends with OpenAI's `detail: low`: all of it, "
        "small. 85 is what OpenAI's own cost.",
    )
    history: History | None = Field(
        default=None,
        description='What older images of a conversation may cost: {"keep": 2, "max_tokens": 64} leaves '
        "those of the last two messages with images as they are.",
    )
    fit: Fit = Field(
        default="refuse",
        description="What becomes of a request whose images do not fit into --max-model-len or "
        "limits.max_tokens_per_request: 'refuse' answers 400, 'prune' brings them to fit, old images first, "
        "regions last.",
    )
    fit_floor: int = Field(
        default=16, ge=1, le=MOST_TOKENS, description="Visual tokens that 'prune' leaves each image at least."
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
        description="What 'plc' makes of tokens outside the region: 'pool' averages groups of them, "
        "'prune' keeps one token of each group; 'foveate' pools too, but the vision tower sees the region "
        "alone at full size, and all else in a small view of the image; 'resampler' has trained queries read "
        "what 'pool' averages and what it leaves out.",
    )
    rim: float = Field(
        default=0.125,
        ge=0,
        le=0.5,
        description="How far around a region the context keeps more than elsewhere, as a fraction of the "
        "image's sides: a region may be a little off. A request's `crop.rim` overrides it.",
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
    foveation: FoveationConfig = Field(
        default=FoveationConfig(), description="What the vision tower sees, for compression 'foveate'."
    )
    resampler: ResamplerConfig = Field(
        default=ResamplerConfig(), description="Whose trained weights, for compression 'resampler'."
    )
    limits: CropLimits = Field(
        default=CropLimits(), validate_default=True, description="What one request may ask for."
    )
    localizer: LocalizerConfig = Field(
        default=LocalizerConfig(), description="Who finds the region of a question that comes without one."
    )
    shadow: ShadowConfig = Field(
        default=ShadowConfig(),
        description="Share of pruned requests whose first token is compared with the unpruned model's, after "
        "they are answered; for metrics alone.",
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

    @model_validator(mode="before")
    @classmethod
    def _fit_default_rate(cls, settings: Any) -> Any:
        """Where only a limit is set, the default keeps within it."""
        if not isinstance(settings, dict):
            return settings
        if "pruning_rate" in settings:
            if settings.get("max_tokens") is not None and not cls._is_default_rate(settings):
                raise ValueError("max_tokens and pruning_rate are two ways to say one thing: leave one out")
            return settings
        try:
            return {**settings, "pruning_rate": cls._default_rate(settings)}
        except ValidationError:
            return settings  # said again, with its place, when the field itself is read

    @classmethod
    def _default_rate(cls, settings: Mapping[str, Any]) -> float:
        limit = CropLimits.model_validate(settings.get("limits") or {}).max_pruning_rate
        default: float = cls.model_fields["pruning_rate"].default
        return min(default, limit)

    @classmethod
    def _is_default_rate(cls, settings: Mapping[str, Any]) -> bool:
        """Whether the rate may have been filled in: settings are written down and read again."""
        try:
            return bool(settings["pruning_rate"] == cls._default_rate(settings))
        except ValidationError:
            return True

    @field_validator("limits")
    @classmethod
    def _check_rate_limit(cls, limits: CropLimits, info: ValidationInfo) -> CropLimits:
        rate = info.data.get("pruning_rate", 0.0)  # absent if it is wrong itself
        if rate > limits.max_pruning_rate:
            raise ValueError(
                f"max_pruning_rate {limits.max_pruning_rate:g} is what requests may ask for at most, but the "
                f"server's own pruning_rate is {rate:g}: lower that one or raise this"
            )
        return limits

    @model_validator(mode="after")
    def _check_foveation(self) -> Self:
        for name, field in FoveationConfig.model_fields.items():
            if self.compression != "foveate" and getattr(self.foveation, name) != field.default:
                raise ValueError(
                    f"foveation.{name} belongs to compression 'foveate', and the compression is "
                    f"{self.compression!r}"
                )
        return self

    @model_validator(mode="after")
    def _check_resampler(self) -> Self:
        if self.compression == "resampler" and self.resampler.weights is None:
            raise ValueError(
                "compression 'resampler' needs resampler.weights, the folder or the Hub repository of a "
                "compressor trained for this model (docs/compressing.md)"
            )
        for name, value in self.resampler.model_dump().items():
            if self.compression != "resampler" and value is not None:
                raise ValueError(
                    f"resampler.{name} belongs to compression 'resampler', and the compression is "
                    f"{self.compression!r}"
                )
        return self

    @model_validator(mode="after")
    def _check_floor(self) -> Self:
        most = self.limits.max_tokens_per_request
        if most is not None and self.fit == "prune" and most < self.fit_floor:
            raise ValueError(
                f"limits.max_tokens_per_request ({most}) is less than fit_floor ({self.fit_floor}): no image "
                "could be brought to fit"
            )
        return self

    @model_validator(mode="after")
    def _check_view(self) -> Self:
        looked_at = self.localizer.kind in ("attention", "engine") or self.compression == "foveate"
        if self.localizer.thumbnail_tokens is not None and not looked_at:
            raise ValueError(
                "localizer.thumbnail_tokens belongs to localizer.kind 'attention' or 'engine', and to "
                f"compression 'foveate'; the kind is {self.localizer.kind!r}"
            )
        return self

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
            InvalidConfigError: naming every wrong key, its value and what is allowed.
        """
        if not isinstance(settings, Mapping):
            raise InvalidConfigError(
                f"additional_config.{CONFIG_KEY} must be an object, got {shorten(settings)}"
            )
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise InvalidConfigError(describe_errors(error, "additional_config.crop", cls)) from None


def describe_errors(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    """One sentence per wrong field of `model`: where it is, what is allowed, what was given (shortened)."""
    sentences = []
    for detail in error.errors(include_url=False):
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part[:LONGEST_KEY]}" for part in detail["loc"]
        )
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            *outer, key = detail["loc"]
            allowed = _keys_at(model, tuple(outer))
            meant = get_close_matches(str(key)[:LONGEST_KEY], allowed, n=1)
            said = f"did you mean {meant[0]!r}?" if meant else f"allowed are {', '.join(allowed)}"
            message = f"unknown key, {said}"
        if detail["type"] == "model_type":
            message = f"must be an object with {', '.join(_keys_at(model, detail['loc']))}"
        given = "" if detail["type"] in ("missing", "value_error") else f", got {shorten(detail['input'])}"
        sentences.append(f"{prefix}{place}: {message}{given}")
    return "; ".join(sentences[:5])


def _keys_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    for part in place:
        annotation = model.model_fields[str(part)].annotation
        choices = [annotation, *get_args(annotation)]  # itself, or one of a union
        model = next(one for one in choices if isinstance(one, type) and issubclass(one, BaseModel))
    return list(model.model_fields)


def shorten(value: object, length: int = 60) -> str:
    """A value for an error message, never longer than `length`, whatever a client has nested in it."""
    if isinstance(value, str):
        value = value[: length + 1]
    elif isinstance(value, list | dict) and len(value) > length:
        return f"{type(value).__name__} of {len(value)}"
    # repr() writes out all that is inside before it can be cut: a megabyte if a client likes.
    depth, parts = _extent(value)
    if depth > _DEEP:
        return f"deeply nested {type(value).__name__}"
    try:
        text = repr(value) if parts <= _MANY else f"{type(value).__name__} of many parts"
    except ValueError:  # Python writes out no whole number of more than 4300 digits
        text = f"too long {type(value).__name__}"
    return text if len(text) <= length else text[: length - 3] + "..."


_DEEP, _MANY = 64, 256


def _extent(value: object) -> tuple[int, int]:
    """How deep lists and objects are nested in a value, and about how much is in it; counts no further than
    is of interest.
    """
    level: list[object] = [value]
    parts = 0
    for depth in range(_DEEP + 2):
        parts += sum(1 + (len(part) // 64 if isinstance(part, str) else 0) for part in level)
        inside: list[object] = []
        for part in level:
            if isinstance(part, dict):
                inside += itertools.chain.from_iterable(itertools.islice(part.items(), _MANY))
            elif isinstance(part, list | tuple):
                inside += itertools.islice(part, _MANY)
        level = inside[: 4 * _MANY]
        if not level:
            return depth, parts
    return _DEEP + 1, parts
