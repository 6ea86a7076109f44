# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT with pruning, over vllm/model_executor/models/llava_next.py."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import llava_next as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.plain_rope import PlainRopeMixin
from vllm_crop.models.plan_fields import CROP_FIELDS
from vllm_crop.models.processing import CropProcessorMixin
from vllm_crop.vision_geometry import geometry_from_configs


class LlavaNextMultiModalProcessor(CropProcessorMixin, stock.LlavaNextMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor,
    info=stock.LlavaNextProcessingInfo,
    dummy_inputs=stock.LlavaDummyInputsBuilder,
)
class LlavaNextForConditionalGeneration(
    PlainRopeMixin, stock.LlavaNextForConditionalGeneration, SupportsMRoPE
):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.geometry = geometry_from_configs(vllm_config.model_config.hf_config.to_dict(), {})

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of a batch of images, one `[num_embeddings, hidden]` tensor per image."""
        if kwargs.get("pixel_values") is None:  # image embeddings from the client are never compressed
            return super().embed_multimodal(**kwargs)
        tiles, sizes = kwargs["pixel_values"], kwargs["image_sizes"]

        def encode(picked: Sequence[int]) -> Any:
            if len(picked) == len(sizes):
                return self.encode_images(tiles, sizes)
            return self.encode_images([tiles[index] for index in picked], sizes[picked])

        num_tokens = [self.geometry.grid(width, height).num_tokens for height, width in sizes.tolist()]
        return self.crop_encoder(num_tokens, encode, **{name: kwargs[name] for name in CROP_FIELDS})

    def encode_images(self, tiles: torch.Tensor | Sequence[torch.Tensor], image_sizes: torch.Tensor) -> Any:
        """Vision tower, projector and newlines.

        Args:
            tiles: per image `[its tiles, 3, side, side]`, the whole image first, maybe filled up with zeros.
            image_sizes: `[images, 2]`, height and width in pixels.

        Returns:
            Per image `[num_tokens, hidden]`.
        """
        return super().embed_multimodal(pixel_values=tiles, image_sizes=image_sizes)
