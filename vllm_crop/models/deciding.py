# SPDX-License-Identifier: Apache-2.0
"""What is done with each image of a request."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.multimodal.parse import ImageProcessorItems
from vllm.utils.cache import LRUCache

from vllm_crop.budget import retained_count
from vllm_crop.config import CropConfig
from vllm_crop.image_plan import plan_image
from vllm_crop.params import CropParams, ImageRequest, InvalidCropError, image_requests
from vllm_crop.plan import TokenPlan
from vllm_crop.vision_geometry import VisionGeometry

_REMEMBERED_SIZES = 65536  # images; a uuid alone does not say how large its image is


@dataclass(frozen=True)
class ImageDecision:
    """What is done with one image.

    Attributes:
        plan: None serves it whole.
        full_tokens: visual tokens unpruned; the most there can be for an image known by its uuid only.
        positions_beyond: how many more position ids the image takes than tokens, if they are the original
            ones; the most it can for an image known by its uuid only, whose plan was made when it was sent.
    """

    request: ImageRequest
    plan: TokenPlan | None
    full_tokens: int
    positions_beyond: int

    @property
    def compression(self) -> TokenPlan | None:
        """The plan if embeddings are compressed before the language model."""
        return self.plan if self.plan is not None and self.plan.compresses else None


class ImageDecider:
    """Plans the images of requests for one server."""

    def __init__(self, info: Any, config: CropConfig, geometry: VisionGeometry) -> None:
        """`info`: vLLM's ProcessingInfo of the model."""
        self.info, self.config, self.geometry = info, config, geometry
        self._sizes: LRUCache[str, Any] = LRUCache(_REMEMBERED_SIZES)
        self._lock = threading.Lock()  # vLLM may process requests in several threads

    def decide(
        self, params: CropParams, mm_items: Mapping[str, Any], image_hashes: Sequence[str]
    ) -> tuple[ImageDecision, ...]:
        """Plan every image of a request.

        Args:
            params: the request's field `crop`.
            mm_items: its items by modality.
            image_hashes: per image, whatever the region.

        Raises:
            InvalidCropError: the request asks for what cannot be done with its images.
        """
        images = mm_items.get("image") or ()
        requests = image_requests(params, self.config, len(images))
        decisions = tuple(
            self._decide_image(images, index, request, image_hashes[index])
            for index, request in enumerate(requests)
        )
        self._check_positions(decisions)
        return decisions

    def _decide_image(self, images: Any, index: int, request: ImageRequest, image_hash: str) -> ImageDecision:
        if not isinstance(images, ImageProcessorItems):
            if request.region is not None:
                raise InvalidCropError("crop.regions: not possible for image embeddings", "crop.regions")
            return ImageDecision(request, None, _num_embeddings(images.get(index)), 0)
        size = self._image_size(images, index, image_hash)
        if size is None:  # a uuid alone, long not seen: vLLM's own cache may still know it
            return self._decide_unseen(request)
        planned = plan_image(self.geometry, size.width, size.height, request)
        grid = planned.tokens.grid
        tokens = planned.tokens if planned.prunes else None
        beyond = max(0, self.geometry.position_span(grid) - planned.tokens.num_embeddings)
        return ImageDecision(request, tokens, grid.num_tokens, beyond)

    def _image_size(self, images: ImageProcessorItems, index: int, image_hash: str) -> Any:
        with self._lock:
            if images.get(index) is not None:
                self._sizes[image_hash] = images.get_image_size(index)
            return self._sizes.get(image_hash)

    def _decide_unseen(self, request: ImageRequest) -> ImageDecision:
        if request.region is not None and request.eviction_layers:
            raise InvalidCropError(
                f"crop.regions: method {request.method!r} needs the image's size, and that of this uuid is "
                "forgotten: send the image once more",
                "crop.regions",
            )
        most = self.info.get_max_image_tokens()
        left = retained_count(most, request.pruning_rate) if request.region else most
        return ImageDecision(request, None, most, most - left)

    def _check_positions(self, decisions: Sequence[ImageDecision]) -> None:
        if self.config.position_ids != "original":
            return
        beyond = sum(decision.positions_beyond for decision in decisions)
        model_config = self.info.ctx.model_config
        positions = model_config.hf_text_config.max_position_embeddings
        positions *= self.geometry.rotary_room
        if model_config.max_model_len + beyond > positions:
            raise InvalidCropError(
                f"crop.regions: {beyond} tokens removed, but this server keeps their position ids and has "
                f"room for {positions - model_config.max_model_len}: prune fewer images or less of them",
                "crop.regions",
            )


def _num_embeddings(image: Any) -> int:
    """Rows of an image that the client has embedded; some families want a dictionary with its grid beside."""
    return len(image["image_embeds"] if isinstance(image, Mapping) else image)
