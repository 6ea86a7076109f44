# SPDX-License-Identifier: Apache-2.0
"""What one request asks for: the body field `crop`, its bounds, and what follows for each image."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_crop.config import LONGEST_KEY, CropConfig, describe_errors, shorten
from vllm_crop.localizers.questions import LONGEST_QUESTION
from vllm_crop.localizers.settings import Pinning
from vllm_crop.planning.budget import Method, method_evicts
from vllm_crop.planning.geometry import Box, Region
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
        unsure: it may reach the engine after others that are rendered later, as one of several conversations
            that go there together: vLLM's processor cache must not take its images for sent.
    """

    params: CropParams
    found: tuple[Found, ...] | None = None
    limited: bool = True
    salt: str | None = None
    overview: bool = False
    unsure: bool = False

    def images(self, config: CropConfig, num_images: int) -> list["ImageRequest"]:
        """What is asked for each image; see image_requests."""
        if self.found is None:
            requests = image_requests(self.params, config, num_images, self.limited)
            return [replace(request, overview=self.overview) for request in requests]
        params = self.params.model_copy(update={"regions": [one.region for one in self.found]})
        requests = image_requests(params, config, num_images, self.limited)
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
    overview: bool = False

    @property
    def around(self) -> Region | None:
        """The region with its rim and what else is kept like it; None without any."""
        if self.region is None:
            return None
        boxes = self.region.widened(self.rim).boxes if self.rim else ()
        boxes += self.warm.boxes if self.warm is not None else ()
        return Region(boxes) if boxes else None

    def without_region(self) -> "ImageRequest":
        """The same for an image that is served whole."""
        return replace(self, region=None)

    def cache_key(self) -> tuple[object, ...] | None:
        """Everything that changes the image's embeddings, as plain values; None if nothing does.

        Eviction changes no embeddings, but with "plc+ilp" how many are left to it.
        """
        if self.region is None or self.method == "ilp":
            return None
        boxes = repr(self.region.as_lists())
        warm = self.warm and repr(self.warm.as_lists())
        numbers = repr(self.pruning_rate), repr(self.rim), warm
        settings = self.compression, self.eviction_layers, self.overview
        return ("plc-2", self.method, boxes, *numbers, *settings)


def is_off(params: CropParams, config: CropConfig) -> bool:
    """Whether pruning is switched off for a request, so that no region matters."""
    rate = config.pruning_rate if params.pruning_rate is None else params.pruning_rate
    return rate == 0 or (params.method or config.method) == "off"


def image_requests(
    params: CropParams, config: CropConfig, num_images: int, limited: bool = True
) -> list[ImageRequest]:
    """Apply a request's settings to its images; region None means "serve it whole".

    Args:
        limited: whether the server's limits for clients hold.

    Raises:
        InvalidCropError: wrong number of regions, beyond the server's limits, or a method the server is not
            prepared for.
    """
    regions = params.regions if params.regions is not None else [None] * num_images
    if len(regions) != num_images:
        raise InvalidCropError(
            "crop.regions",
            f"one entry per image needed (null for none), got {len(regions)} for {num_images} image(s)",
        )
    limits = config.limits
    rate = config.pruning_rate if params.pruning_rate is None else params.pruning_rate
    if limited and params.pruning_rate is not None and rate > limits.max_pruning_rate:
        raise InvalidCropError(
            "crop.pruning_rate", f"this server allows at most {limits.max_pruning_rate}, got {rate}"
        )
    for index, region in enumerate(regions):
        if limited and region is not None and len(region.boxes) > limits.max_boxes_per_image:
            raise InvalidCropError(
                "crop.regions",
                f"this server allows at most {limits.max_boxes_per_image} boxes per image, "
                f"got {len(region.boxes)}",
                f"crop.regions[{index}]",
            )
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
    return [
        ImageRequest(None if off else region, rate, config.compression, method, stages, rim, off=off)
        for region in regions
    ]
