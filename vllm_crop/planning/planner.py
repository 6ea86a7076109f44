# SPDX-License-Identifier: Apache-2.0
"""From an image's size and what is asked for it to its TokenPlan: the one path of server and commands."""

from dataclasses import dataclass

from vllm_crop.families.registry import VisionGeometry
from vllm_crop.planning.budget import BudgetError
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import TokenPlan, make_plan, whole_image_plan
from vllm_crop.request import ImageRequest, InvalidCropError


@dataclass(frozen=True)
class ImagePlan:
    """The plan of one image; `region` is what the model sees of the region asked for, None if nothing."""

    region: Region | None
    tokens: TokenPlan

    @property
    def prunes(self) -> bool:
        """Whether some decoder layer runs with fewer embeddings than the image has tokens."""
        return self.tokens.compresses or self.tokens.evicts


def plan_image(geometry: VisionGeometry, width: int, height: int, request: ImageRequest) -> ImagePlan:
    """Plan an image of this size in pixels; without a region in view it is left whole.

    Raises:
        InvalidCropError: the pruning rate cannot be met with the request's eviction layers.
    """
    grid = geometry.grid(width, height)
    region = request.region and geometry.view(width, height).project(request.region)
    if region is None:
        return ImagePlan(None, whole_image_plan(grid, request.pruning_rate))
    try:
        tokens = make_plan(
            grid,
            region,
            request.pruning_rate,
            request.compression,
            request.method,
            geometry.num_layers,
            request.eviction_layers,
        )
    except BudgetError as error:
        raise InvalidCropError(f"crop.pruning_rate: {error}", "crop.pruning_rate") from None
    return ImagePlan(region, tokens)
