# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 with pruning, over vllm/model_executor/models/llava.py."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import llava as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.processor import CropProcessorMixin


class LlavaMultiModalProcessor(CropProcessorMixin, stock.LlavaMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor,
    info=stock.LlavaProcessingInfo,
    dummy_inputs=stock.LlavaDummyInputsBuilder,
)
class LlavaForConditionalGeneration(PlainRopeMixin, stock.LlavaForConditionalGeneration, SupportsMRoPE):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config
        self.tokens_per_image = geometry_from_configs(hf_config.to_dict(), {}).max_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of a batch of images, one `[num_embeddings, hidden]` tensor per image."""
        if kwargs.get("pixel_values") is None:  # image embeddings from the client are never compressed
            return super().embed_multimodal(**kwargs)
        pixel_values = kwargs.pop("pixel_values")

        def encode(picked: Sequence[int]) -> Any:
            return self.encode_images(pixel_values[picked])

        return self.crop_encoder([self.tokens_per_image] * len(pixel_values), encode, **kwargs)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision tower and projector: `[images, 3, height, width]` -> `[images, num_tokens, hidden]`."""
        return super().embed_multimodal(pixel_values=pixel_values)
