# SPDX-License-Identifier: Apache-2.0
"""What is done with each image of a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm.multimodal.parse import ImageProcessorItems

from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedImageError
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.planning.planner import plan_image
from vllm_crop.request import CropRequest, ImageRequest, InvalidCropError

Size = tuple[int, int]
Whole = Literal["no_region", "out_of_view", "not_possible"]
_CANNOT_PRUNE = (InvalidCropError, UnsupportedImageError)


@dataclass(frozen=True)
class ImageDecision:
    """What is done with one image.

    Attributes:
        request: as it is carried out: without the region where one cannot be used.
        plan: None serves the image whole.
        whole: why it does; "not_possible" is a region that the server found and cannot use.
        mrope_position_delta: how many more position ids the image takes than tokens, if they are the original
            ones.
    """

    request: ImageRequest
    plan: TokenPlan | None = None
    whole: Whole = "no_region"
    mrope_position_delta: int = 0

    @property
    def compression(self) -> TokenPlan | None:
        """The plan if embeddings are compressed before the language model."""
        return self.plan if self.plan is not None and self.plan.compresses else None


class ImageDecider:
    """Plans the images of requests for one server."""

    def __init__(self, info: Any, config: CropConfig, geometry: VisionGeometry) -> None:
        """`info`: vLLM's ProcessingInfo of the model."""
        self.info, self.config, self.geometry = info, config, geometry

    def decide(
        self,
        asked: CropRequest,
        mm_items: Mapping[str, Any],
        sizes: Sequence[Size | None],
        other_kwargs: Sequence[str] = (),
    ) -> tuple[ImageDecision, ...]:
        """Plan every image of a request.

        Args:
            mm_items: its items by modality.
            sizes: per image, width and height in pixels; None where they are not known.
            other_kwargs: names of the request's own processor settings, which can move an image under its
                region.

        Raises:
            InvalidCropError: the client asks for what cannot be done with its images.
            UnsupportedImageError: for a client's region; the image processor refuses the image too.
        """
        images = mm_items.get("image") or ()
        if asked.found is not None and len(asked.found) != len(images):
            asked = replace(asked, found=(None,) * len(images))  # embeddings that vLLM has taken apart
        requests = asked.images(self.config, len(images))
        try:
            return self._decide(images, requests, sizes, other_kwargs)
        except _CANNOT_PRUNE:
            if asked.found is None:
                raise
        # Image by image, so that one that cannot be pruned takes none along.
        return self._with_what_can_be_used(images, requests, sizes, other_kwargs)

    def _decide(
        self,
        images: Any,
        requests: Sequence[ImageRequest],
        sizes: Sequence[Size | None],
        other_kwargs: Sequence[str],
    ) -> tuple[ImageDecision, ...]:
        if other_kwargs and any(request.region for request in requests):
            raise InvalidCropError(
                f"crop.regions: not possible beside other mm_processor_kwargs of the request, "
                f"{sorted(other_kwargs)}: they can move the image under the region",
                "crop.regions",
            )
        decisions = tuple(
            self._decide_image(images, request, size) for request, size in zip(requests, sizes, strict=True)
        )
        self._check_positions(decisions)
        return decisions

    def _with_what_can_be_used(
        self,
        images: Any,
        requests: Sequence[ImageRequest],
        sizes: Sequence[Size | None],
        other_kwargs: Sequence[str],
    ) -> tuple[ImageDecision, ...]:
        decisions: list[ImageDecision] = []
        for request, size in zip(requests, sizes, strict=True):
            try:
                (decision,) = self._decide(images, [request], [size], other_kwargs)
                self._check_positions([*decisions, decision])
            except _CANNOT_PRUNE:
                decision = ImageDecision(request.without_region(), whole="not_possible")
            decisions.append(decision)
        return tuple(decisions)

    def _decide_image(self, images: Any, request: ImageRequest, size: Size | None) -> ImageDecision:
        if request.region is None:
            return ImageDecision(request)
        if not isinstance(images, ImageProcessorItems):
            raise InvalidCropError("crop.regions: not possible for image embeddings", "crop.regions")
        if size is None:  # a uuid alone that nobody knows: vLLM says so when it misses the image
            return ImageDecision(request.without_region())
        planned = plan_image(self.geometry, *size, request)
        if not planned.prunes:
            return ImageDecision(request, whole="no_region" if planned.region else "out_of_view")
        span = self.geometry.position_span(planned.tokens.grid)
        return ImageDecision(
            request, planned.tokens, mrope_position_delta=max(0, span - planned.tokens.num_embeddings)
        )

    def _check_positions(self, decisions: Sequence[ImageDecision]) -> None:
        if self.config.position_ids != "original":
            return
        beyond = sum(decision.mrope_position_delta for decision in decisions)
        model_config = self.info.ctx.model_config
        positions = model_config.hf_text_config.max_position_embeddings
        positions *= self.geometry.rotary_room
        if model_config.max_model_len + beyond > positions:
            raise InvalidCropError(
                f"crop.regions: {beyond} tokens removed, but this server keeps their position ids and has "
                f"room for {positions - model_config.max_model_len}: prune fewer images or less of them",
                "crop.regions",
            )
