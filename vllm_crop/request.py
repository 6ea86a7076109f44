# SPDX-License-Identifier: Apache-2.0
"""What one request asks for each of its images: its field `crop` with the server's settings applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams, InvalidCropError
from vllm_crop.planning.budget import Method, method_evicts
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.image_budgets import BudgetSource, ImageBudget, Shown, image_budgets
from vllm_crop.planning.plan import Compression


@dataclass(frozen=True)
class LengthBound:
    """What a prompt whose images keep their position ids may come to.

    Attributes:
        tokens: of prompt and answer together: one more, and its position id is none that the model has.
        parameter: the client's field that has left the ids without tokens, or "images".
    """

    tokens: int
    parameter: str


class BoundedPlaceholders(dict[str, Any]):
    """`mm_placeholders` of an engine's input, with what its length is bounded to.

    Here it stays with the images: vLLM makes the input of each step of a beam anew, of these and little else.
    """

    def __init__(self, placeholders: Mapping[str, Any], bound: LengthBound) -> None:
        super().__init__(placeholders)
        self.bound = bound


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
        setting: the server's that bounds them.
        advice: what a client can do where they are not pruned.
    """

    most: int
    aim: int
    prunes: bool
    setting: str = "limits.max_tokens_per_request"
    advice: str = """: send "fit": "prune" in crop"""

    def check(self, tokens: int, why: str = "") -> None:
        """Refuse images that take more.

        Args:
            tokens: what they take together.
            why: they are not pruned, or what to do.

        Raises:
            InvalidCropError: with both numbers.
        """
        if tokens > self.most:
            raise self.refusal(f"take {tokens} visual tokens", why)

    def refusal(self, what: str, why: str = "") -> InvalidCropError:
        """The error for images that do not fit; `what` they do, and `why` they are not made to fit."""
        return InvalidCropError(
            "crop.fit",
            f"together they {what}, and there is room for {self.most} ({self.setting}){why}",
            "images of the request",
        )


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
        shown: a client gets its token ids to read, and no engine does: they stay the tokenizer's.
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
    shown: bool = False

    def images(self, config: CropConfig, num_images: int) -> list["ImageRequest"]:
        """What is asked for each image; see image_requests."""
        budgets = self.budgets if self.budgets is not None and len(self.budgets) == num_images else None
        if not self.limited and budgets is None:
            budgets = NO_BUDGET * num_images  # the localizer's view is what the server wants it to be
        if self.found is None:
            requests = image_requests(self.params, config, num_images, self.limited, budgets)
            return [request.for_localizer() for request in requests] if self.overview else requests
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

    def for_localizer(self) -> "ImageRequest":
        """The same for a localizer's view, of which plain means are made whoever reads the picture later."""
        compression: Compression = "pool" if self.compression == "resampler" else self.compression
        return replace(self, compression=compression, overview=True)

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
        elif region is None and not off:
            requests.append(whole)
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
