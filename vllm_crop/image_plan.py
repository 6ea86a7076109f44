# SPDX-License-Identifier: Apache-2.0
"""From an image's size and what is asked for it to its TokenPlan: the one path of server and commands."""

from dataclasses import dataclass

from vllm_crop.geometry import Region
from vllm_crop.params import ImageRequest
from vllm_crop.plan import TokenPlan, make_plan, whole_image_plan
from vllm_crop.vision_geometry import VisionGeometry


@dataclass(frozen=True)
class ImagePlan:
    """The plan of one image; `region` is what the model sees of the region asked for, None if nothing."""

    region: Region | None
    tokens: TokenPlan

    @property
    def prunes(self) -> bool:
        """Whether fewer embeddings are left than the image has tokens."""
        return self.tokens.num_embeddings < self.tokens.grid.num_tokens


def plan_image(geometry: VisionGeometry, width: int, height: int, request: ImageRequest) -> ImagePlan:
    """Plan an image of this size in pixels; without a region in view it is left whole."""
    grid = geometry.grid(width, height)
    region = request.region and geometry.view(width, height).project(request.region)
    if region is None:
        return ImagePlan(None, whole_image_plan(grid, request.pruning_rate))
    return ImagePlan(region, make_plan(grid, region, request.pruning_rate, request.compression))
