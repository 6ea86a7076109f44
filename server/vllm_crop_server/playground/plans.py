# SPDX-License-Identifier: Apache-2.0
"""What the server would do with an image of some size: the plan behind the playground's overlay."""

from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self, runtime_checkable

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_crop import __version__
from vllm_crop.config import describe_errors
from vllm_crop.crop_params import CropParams, InvalidCropError, parse_region
from vllm_crop.errors import UnsupportedImageError
from vllm_crop.frontend.room import room_of
from vllm_crop.planner import Planner
from vllm_crop.planning.budget import Method
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.image_budgets import MOST_TOKENS
from vllm_crop.request import CropRequest

LONGEST_SIDE = 65535  # in pixels, as JPEG has it
_FIELDS = {
    "crop.regions": "region",
    "crop.pruning_rate": "pruning_rate",
    "crop.max_tokens": "max_tokens",
    "crop.method": "method",
    "crop.fit": "image_size",
}

Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]


@runtime_checkable
class PlanningProcessor(Protocol):
    """The part of our multimodal processors (vllm_crop/models/processor.py) that decides."""

    @property
    def planner(self) -> Planner:
        """Plans as the served model's requests are planned."""
        ...


class PlanRequest(BaseModel):
    """Body of the plan route; what it leaves out, the server's configuration decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image_size: tuple[Side, Side] = Field(description="Width and height in pixels, upright.")
    region: Annotated[Region | None, BeforeValidator(parse_region)] = Field(
        default=None, description="As an entry of `crop.regions`: null, one box or a list of boxes."
    )
    pruning_rate: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    method: Method | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Validate a JSON body.

        Raises:
            InvalidCropError: naming every wrong field.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            place = error.errors(include_url=False)[0]["loc"]
            field = str(place[0])[:40] if place else "body"
            where, _, reason = describe_errors(error, "body", cls).partition(": ")
            raise InvalidCropError(field, reason, where) from None


@dataclass(frozen=True)
class Page:
    """What the playground's page is told: plans of the served model, and what requests can choose from."""

    planner: Planner

    @classmethod
    def of_processor(cls, processor: Any) -> Self | None:
        """That of a vLLM multimodal processor; None if it is not one of ours, or the model sees no images."""
        if not isinstance(processor, PlanningProcessor):
            return None
        return cls(processor.planner)

    def plan(self, asked: PlanRequest) -> dict[str, Any]:
        """The plan as `vllm-crop plan --json` prints it, and what of the image the model sees.

        Raises:
            InvalidCropError: naming the field of the request that cannot be met.
        """
        if asked.pruning_rate is not None and asked.max_tokens is not None:
            raise InvalidCropError("max_tokens", "send this or a pruning_rate, not both")
        params = CropParams(
            regions=[asked.region],
            pruning_rate=asked.pruning_rate,
            max_tokens=asked.max_tokens,
            method=asked.method,
        )
        width, height = asked.image_size
        try:
            room = room_of({}, params, self.planner.config, longest=0, request=None)
            asked_for = CropRequest(params, room=room)
            (decision,) = self.planner.plan(asked_for, [(width, height)])
            request = decision.request
            planned = self.planner.plan_image(request, width, height)
        except InvalidCropError as error:
            raise InvalidCropError(_FIELDS[error.parameter], error.reason) from None
        except UnsupportedImageError as error:
            raise InvalidCropError("image_size", str(error)) from None
        return {
            **planned.to_json(self.planner.geometry.num_layers),
            "method": request.method,
            "region_in_view": planned.region is not None,
            "window": self.planner.geometry.view(width, height).window.as_list(),
        }

    def settings(self) -> dict[str, Any]:
        """What requests to this server can choose from."""
        config = self.planner.config
        methods: list[Method] = ["plc", "ilp", "plc+ilp"] if config.stages else ["plc"]
        default = config.method if config.method in methods else methods[0]
        return {
            "methods": methods,
            "method": default,
            "pruning_rate": min(config.pruning_rate, config.limits.max_pruning_rate),
            "max_pruning_rate": config.limits.max_pruning_rate,
            "max_tokens": config.max_tokens,
            "localizer": config.localizer.kind,
            "num_layers": self.planner.geometry.num_layers,
            "eviction_layers": list(config.stages),
            "version": __version__,
        }
