# SPDX-License-Identifier: Apache-2.0
"""The body field `crop` of a request: its keys, its bounds, what is wrong with it in words."""

from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vllm_crop.config import LONGEST_KEY, Fit, describe_errors, shorten
from vllm_crop.localizers.questions import LONGEST_QUESTION
from vllm_crop.localizers.settings import Pinning
from vllm_crop.planning.budget import Method
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.planning.image_budgets import MOST_TOKENS, History

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


# Objects of a body in which clients put the field by mistake, and nobody looks for it.
MISPLACED_IN = ("extra_body", "vllm_xargs")


def misplaced(parent: str) -> InvalidCropError:
    """What is wrong where the field stands in one of MISPLACED_IN."""
    return InvalidCropError(
        f"{parent}.crop",
        'nobody reads it there: it belongs into the body itself, {"model": ..., "messages": ..., '
        '"crop": {...}} (extra_body is an argument of the Python client openai, which does that)',
    )


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
        own = [_entry(self.regions, index), self.pruning_rate, _entry(self.max_tokens, index), self.method]
        return any(each is not None for each in own)

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


def _entry(values: Any, index: int) -> Any:
    """What is said of one image, by a list or for all."""
    if not isinstance(values, list | tuple):
        return values
    return values[index] if index < len(values) else None


_NOTHING_ASKED = CropParams()


def _check_size(value: Mapping[Any, Any]) -> None:
    """Bound the field before each of its parts is looked at, and wrong ones are described."""
    if len(value) > MAX_KEYS:
        raise InvalidCropError("crop", f"at most {MAX_KEYS} keys, got {len(value)}")
    regions = value.get("regions")
    if not isinstance(regions, list | tuple) or len(regions) > MAX_IMAGES:
        return  # refused by its type or its length
    if len(regions) == 4 and all(isinstance(side, int | float) for side in regions):
        raise InvalidCropError(
            "crop.regions", f"one entry for each image needed: did you mean {shorten([list(regions)])}?"
        )
    num_boxes = sum(len(boxes) for boxes in regions if isinstance(boxes, list | tuple))
    if num_boxes > MAX_BOXES_IN_ALL:
        raise InvalidCropError("crop.regions", f"at most {MAX_BOXES_IN_ALL} boxes in all, got {num_boxes}")
