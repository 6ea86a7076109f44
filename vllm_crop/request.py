# SPDX-License-Identifier: Apache-2.0
"""What one request asks for: the body field `crop`, its bounds, and what follows for each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vllm_crop.config import LONGEST_KEY, CropConfig, Fit, describe_errors, shorten
from vllm_crop.localizers.questions import LONGEST_QUESTION
from vllm_crop.localizers.settings import Pinning
from vllm_crop.planning.budget import Method, method_evicts
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.planning.image_budgets import (
    MOST_TOKENS,
    BudgetSource,
    History,
    ImageBudget,
    Shown,
    image_budgets,
)
from vllm_crop.planning.plan import Compression

FACTS_HEADER = "x-crop-facts"  # of every answer about pictures
MAX_IMAGES = 1024  # a bound for the list's length before anything is known of the request's images
MAX_BOXES = 1024  # of one image
MAX_BOXES_IN_ALL = 4096
MAX_KEYS = 32  # of the field: each wrong one costs a sentence to find, so they are counted first
MAX_FIELD_BYTES = 256 << 10
MAX_FIELD_DEPTH = 400  # far more than regions have, less than Python's JSON parser bears


class InvalidCropError(ValueError):
    """What a request asks for is wrong or not possible: answered with HTTP 400.

    Attributes:
        parameter: the field, as in `crop.regions`.
        reason: what is wrong with it, without its name.
    """

    def __init__(self, parameter: str, reason: str, place: str | None = None) -> None:
        """`place`: more exactly where, as in `crop.regions[2]`."""
        super().__init__(f"{place or parameter}: {reason}")
        self.parameter = parameter
        self.reason = reason


def parse_region(value: Any) -> Region | None:
    """None, one box or a list of boxes -> the region of one image."""
    if value is None:
        return None
    if isinstance(value, Region):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"must be null, a box [x0, y0, x1, y1] or a list of boxes, got {shorten(value)}")
    boxes = value if isinstance(value[0], list | tuple) else [value]
    if len(boxes) > MAX_BOXES:
        raise ValueError(f"at most {MAX_BOXES} boxes, got {len(boxes)}")
    return Region(tuple(_parse_box(box) for box in boxes))


def parse_max_tokens(value: Any) -> int | tuple[int | None, ...] | None:
    """A bound for every image, or a list with one for each, null for those without."""
    if value is None or _is_count(value):
        bound: int | None = value
        return bound
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"must be a whole number from 0 to {MOST_TOKENS} or a list of such, got {shorten(value)}"
        )
    if len(value) > MAX_IMAGES:
        raise ValueError(f"at most {MAX_IMAGES} entries, got {len(value)}")
    for each in value:
        if each is not None and not _is_count(each):
            raise ValueError(f"must be null or a whole number from 0 to {MOST_TOKENS}, got {shorten(each)}")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS


def _parse_box(value: Any) -> Box:
    is_box = isinstance(value, list | tuple) and len(value) == 4
    if not is_box or not all(_is_fraction(number) for number in value):
        raise ValueError(f"a box must be four fractions [x0, y0, x1, y1] in [0, 1], got {shorten(value)}")
    return Box(*(float(number) for number in value))


def _is_fraction(number: Any) -> bool:
    # numpy's numbers are Real; bool is an int in Python; NaN fails the comparison.
    if isinstance(number, bool) or not isinstance(number, Real):
        return False
    side: Any = number
    return bool(0 <= side <= 1)


class CropParams(BaseModel):
    """One request's settings; what it leaves out, the server's configuration decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    regions: Annotated[
        list[Annotated[Region | None, BeforeValidator(parse_region)]] | None, Field(max_length=MAX_IMAGES)
    ] = Field(
        default=None,
        description="Per image of the request, in prompt order: null, one box or several boxes "
        "[x0, y0, x1, y1] as fractions of the image as sent.",
    )
    pruning_rate: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Fraction of each image's visual tokens to remove, averaged over layers, in [0, 1).",
    )
    max_tokens: Annotated[int | tuple[int | None, ...] | None, BeforeValidator(parse_max_tokens)] = Field(
        default=None,
        description="Most visual tokens of each image, or a list with one number per image (null for "
        "none), in place of a pruning_rate; with or without regions. 0: the image is not seen at all.",
    )
    history: History | None = Field(
        default=None,
        description="What older images of the conversation may cost: 'keep', 'max_tokens' and 'stride'.",
    )
    fit: Fit | None = Field(
        default=None,
        description="What becomes of images that do not fit into the prompt: 'refuse' or 'prune'.",
    )
    method: Method | None = Field(
        default=None,
        description="'plc' compresses visual tokens before the language model, 'ilp' evicts them inside it, "
        "'plc+ilp' does both, 'off' leaves the images as they are.",
    )

    rim: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        allow_inf_nan=False,
        description="How far around a region the context keeps more than elsewhere, as a fraction of the "
        "image's sides; 0 for a sharp edge.",
    )
    localize: Pinning | None = Field(
        default=None,
        description="Which question an image's region is found for, where the server finds regions: 'pinned' "
        "that of the message the image came with, 'latest' the conversation's last one, 'off' none.",
    )
    question: Annotated[str, Field(min_length=1, max_length=LONGEST_QUESTION)] | None = Field(
        default=None,
        description="The question to find regions for, where the prompt does not show which it is or the "
        "localizer should be asked another.",
    )

    @model_validator(mode="after")
    def _check_one_budget(self) -> Self:
        if self.pruning_rate is not None and self.max_tokens is not None:
            raise ValueError("max_tokens and pruning_rate are two ways to say one thing: send one of them")
        return self

    def speaks_of(self, index: int) -> bool:
        """Whether the request says itself how an image is pruned."""
        region = self.regions is not None and index < len(self.regions) and self.regions[index] is not None
        return region or any(each is not None for each in (self.pruning_rate, self.max_tokens, self.method))

    def tokens_of(self, num_images: int) -> list[int | None]:
        """`max_tokens` of each image.

        Raises:
            InvalidCropError: it is a list for another number of images.
        """
        if isinstance(self.max_tokens, tuple):
            if len(self.max_tokens) != num_images:
                raise InvalidCropError(
                    "crop.max_tokens",
                    f"one entry per image needed (null for none), got {len(self.max_tokens)} for "
                    f"{num_images} image(s)",
                )
            return list(self.max_tokens)
        return [self.max_tokens] * num_images

    @classmethod
    def parse(cls, value: Any) -> "CropParams":
        """Validate the `crop` field of a request.

        Raises:
            InvalidCropError: naming every wrong field.
        """
        if isinstance(value, CropParams):
            return value
        if not isinstance(value, Mapping):
            raise InvalidCropError("crop", f"must be an object, got {shorten(value)}")
        if not value:
            return _NOTHING_ASKED
        _check_size(value)
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]["loc"]
            parameter = ".".join(["crop", *(str(part)[:LONGEST_KEY] for part in first[:1])])
            place, _, reason = describe_errors(error, "crop", cls).partition(": ")
            raise InvalidCropError(parameter, reason, place) from None


_NOTHING_ASKED = CropParams()


def _check_size(value: Mapping[Any, Any]) -> None:
    """Bound the field before each of its parts is looked at, and wrong ones are described."""
    if len(value) > MAX_KEYS:
        raise InvalidCropError("crop", f"at most {MAX_KEYS} keys, got {len(value)}")
    regions = value.get("regions")
    if not isinstance(regions, list | tuple) or len(regions) > MAX_IMAGES:
        return  # refused by its type or its length
    num_boxes = sum(len(boxes) for boxes in regions if isinstance(boxes, list | tuple))
    if num_boxes > MAX_BOXES_IN_ALL:
        raise InvalidCropError("crop.regions", f"at most {MAX_BOXES_IN_ALL} boxes in all, got {num_boxes}")


@dataclass(frozen=True)
class Found:
    """What a server has found out about one image itself.

    Attributes:
        region: None to serve the image whole.
        warm: places that the question may be about too: they are kept as the rim is.
        late: nobody knows where to look: prune evenly, in late layers alone (`Planner`).
        picture: what it was found in (localizers/thumbnails.py), with the view that was made of it.
    """

    region: Region | None = None
    warm: Region | None = None
    late: bool = False
    picture: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class UnseenImage:
    """An image that may cost nothing, taken out of its prompt.

    Attributes:
        index: among all images of the request.
        size: width and height in pixels, None where it is not known.
        by: who wants it to cost nothing.
    """

    index: int
    size: tuple[int, int] | None
    by: BudgetSource


@dataclass(frozen=True)
class Room:
    """What the images of a request may take in its prompt together.

    Attributes:
        most: visual tokens; with more it is refused or pruned.
        aim: what is left of them if it is pruned: the answer needs room too.
        prunes: whether it is.
    """

    most: int
    aim: int
    prunes: bool


@dataclass(frozen=True)
class CropRequest:
    """What a processor is told of one request's pruning.

    Attributes:
        params: the client's field `crop`; empty if it sent none.
        found: per image what the server has found itself; None where all regions are the client's. What is
            found can make an answer cheaper, never an error: where it cannot be used, the image is served
            whole.
        limited: whether the limits for clients hold; not for the localizer's own requests.
        salt: the request's `cache_salt`.
        overview: as of ImageRequest.
        budgets: what each image may cost; None where nothing is known of them but the request's settings.
        room: for all images in the prompt; None where nobody counts them.
        unseen: images that were taken out of the prompt; of no other attribute's lists they are part.
        unsure: it may reach the engine after others that are rendered later, as one of several conversations
            that go there together: vLLM's processor cache must not take its images for sent.
    """

    params: CropParams
    found: tuple[Found, ...] | None = None
    limited: bool = True
    salt: str | None = None
    overview: bool = False
    budgets: tuple[ImageBudget, ...] | None = None
    room: Room | None = None
    unseen: tuple[UnseenImage, ...] = ()
    unsure: bool = False

    def images(self, config: CropConfig, num_images: int) -> list["ImageRequest"]:
        """What is asked for each image; see image_requests."""
        budgets = self.budgets if self.budgets is not None and len(self.budgets) == num_images else None
        if not self.limited and budgets is None:
            budgets = NO_BUDGET * num_images  # the localizer's view is what the server wants it to be
        if self.found is None:
            requests = image_requests(self.params, config, num_images, self.limited, budgets)
            return [replace(request, overview=self.overview) for request in requests]
        params = self.params.model_copy(update={"regions": [one.region for one in self.found]})
        requests = image_requests(params, config, num_images, self.limited, budgets)
        return [replace(request, warm=one.warm) for request, one in zip(requests, self.found, strict=True)]


@dataclass(frozen=True)
class ImageRequest:
    """What is asked for one image, the server's configuration applied.

    Attributes:
        region: None to serve the image whole.
        pruning_rate: in [0, 1), averaged over layers.
        compression: what "plc" makes of the tokens outside the region.
        method: the request's, else the server's.
        eviction_layers: strictly ascending; empty if the method does not evict.
        rim: how far around the region tokens are kept at an intermediate ratio, as a fraction of the image's
            sides.
        warm: further places that are kept like that.
        off: whether the image is served whole because pruning is switched off, and not for want of a region.
        max_tokens: the bound that stands in place of the rate; None without one.
        by: who has set it; with "detail" and no bound, who wants the image whole.
        overview: where the prompt has all of the image small beside larger tiles, that alone is seen and
            kept; for localizers.
    """

    region: Region | None
    pruning_rate: float
    compression: Compression
    method: Method = "plc"
    eviction_layers: tuple[int, ...] = ()
    rim: float = 0.0
    warm: Region | None = None
    off: bool = False
    max_tokens: int | None = None
    by: BudgetSource | None = None
    overview: bool = False

    @property
    def wants_less(self) -> bool:
        """Whether the image may become less than it is: it has a region or a bound."""
        return self.region is not None or self.max_tokens is not None

    def rate_for(self, num_tokens: int) -> float:
        """The pruning rate of an image with so many visual tokens, in [0, 1)."""
        if self.max_tokens is None:
            return self.pruning_rate
        return max(0.0, 1 - max(1, self.max_tokens) / num_tokens)

    def bounded(self, max_tokens: int) -> "ImageRequest":
        """The same for an image that is to take so many tokens in the prompt."""
        return replace(self, max_tokens=max_tokens, method="plc", eviction_layers=(), off=False)

    @property
    def around(self) -> Region | None:
        """The region with its rim and what else is kept like it; None without any."""
        if self.region is None:
            return None
        boxes = self.region.widened(self.rim).boxes if self.rim else ()
        boxes += self.warm.boxes if self.warm is not None else ()
        return Region(boxes) if boxes else None

    def without_region(self) -> "ImageRequest":
        """The same for an image whose region cannot be used."""
        return replace(self, region=None)

    def without_budget(self) -> "ImageRequest":
        """The same for an image that is served whole."""
        return replace(self, region=None, max_tokens=None, by=None)

    def cache_key(self) -> tuple[object, ...] | None:
        """Everything that changes the image's embeddings, as plain values; None if nothing does.

        Eviction changes no embeddings, but with "plc+ilp" how many are left to it.
        """
        if not self.wants_less or self.method == "ilp":
            return None
        boxes = self.region and repr(self.region.as_lists())
        warm = self.warm and repr(self.warm.as_lists())
        numbers = repr(self.pruning_rate), repr(self.rim), warm
        settings = self.compression, self.eviction_layers, self.overview, self.max_tokens
        return ("plc-3", self.method, boxes, *numbers, *settings)


def is_off(params: CropParams, config: CropConfig) -> bool:
    """Whether pruning is switched off for a request, so that no region matters."""
    rate = config.pruning_rate if params.pruning_rate is None else params.pruning_rate
    return rate == 0 or (params.method or config.method) == "off"


NO_BUDGET = (ImageBudget(),)


def request_budgets(
    params: CropParams, config: CropConfig, num_images: int, shown: Sequence[Shown] | None = None
) -> tuple[ImageBudget, ...]:
    """What each image of a request may cost.

    Args:
        shown: where each stands in its conversation; None where that is not known.

    Raises:
        InvalidCropError: `max_tokens` is a list for another number of images.
    """
    asked = params.tokens_of(num_images)
    if params.method == "off" or params.pruning_rate == 0:
        return NO_BUDGET * num_images  # the client wants all of all
    return image_budgets(
        asked,
        [params.speaks_of(index) for index in range(num_images)],
        shown or [Shown()] * num_images,
        config.detail_low_tokens,
        None if params.pruning_rate is not None else config.max_tokens,
        (params.history or config.history) if shown is not None else None,
        in_prompt=not method_evicts(params.method or config.method),
    )


def image_requests(
    params: CropParams,
    config: CropConfig,
    num_images: int,
    limited: bool = True,
    budgets: Sequence[ImageBudget] | None = None,
) -> list[ImageRequest]:
    """Apply a request's settings to its images; without a region and a budget they are served whole.

    Args:
        limited: whether the server's limits for clients hold.
        budgets: of the images; None for those of a request that nothing more is known of.

    Raises:
        InvalidCropError: wrong number of regions or budgets, beyond the server's limits, or a method the
            server is not prepared for.
    """
    regions = params.regions if params.regions is not None else [None] * num_images
    if len(regions) != num_images:
        raise InvalidCropError(
            "crop.regions",
            f"one entry per image needed (null for none), got {len(regions)} for {num_images} image(s)",
        )
    if budgets is None:
        budgets = request_budgets(params, config, num_images)
    rate = config.pruning_rate if params.pruning_rate is None else params.pruning_rate
    if limited:
        _check_limits(params, config, regions, num_images)
    method = params.method or config.method
    evicts = method_evicts(method)
    if evicts and not config.stages:
        raise InvalidCropError(
            "crop.method",
            f"{method!r} needs a server that is prepared to evict, started with "
            """--crop-config '{"eviction_layers": [2]}'""",
        )
    off = is_off(params, config)
    rim = config.rim if params.rim is None else params.rim
    stages = config.stages if evicts else ()
    whole = ImageRequest(None, rate, config.compression, method, stages, rim)
    requests = []
    for region, budget in zip(regions, budgets, strict=True):
        if budget.max_tokens is not None:
            asked = replace(whole, region=None if budget.evenly else region)
            if budget.by not in ("max_tokens", "server") or method == "off":
                asked = asked.bounded(budget.max_tokens)
            requests.append(replace(asked, max_tokens=budget.max_tokens, by=budget.by))
        elif budget.whole:
            requests.append(replace(whole, by=budget.by))
        else:
            requests.append(replace(whole, region=None if off else region, off=off))
    return requests


def _check_limits(
    params: CropParams, config: CropConfig, regions: Sequence[Region | None], num_images: int
) -> None:
    limits = config.limits
    rate = params.pruning_rate
    if rate is not None and rate > limits.max_pruning_rate:
        raise InvalidCropError(
            "crop.pruning_rate", f"this server allows at most {limits.max_pruning_rate}, got {rate}"
        )
    for tokens in params.tokens_of(num_images):
        if tokens is not None and tokens < limits.min_tokens:
            raise InvalidCropError(
                "crop.max_tokens", f"this server allows no less than {limits.min_tokens}, got {tokens}"
            )
    if params.history is not None and params.history.max_tokens < limits.min_tokens:
        raise InvalidCropError(
            "crop.history",
            f"this server allows no less than {limits.min_tokens}, got {params.history.max_tokens}",
            "crop.history.max_tokens",
        )
    for index, region in enumerate(regions):
        if region is not None and len(region.boxes) > limits.max_boxes_per_image:
            raise InvalidCropError(
                "crop.regions",
                f"this server allows at most {limits.max_boxes_per_image} boxes per image, "
                f"got {len(region.boxes)}",
                f"crop.regions[{index}]",
            )
