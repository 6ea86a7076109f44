# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT with pruning, over vllm/model_executor/models/llava_next.py."""

from typing import Any

import torch
from vllm.model_executor.models import llava_next as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.tiled import CropTiledProcessorMixin, TiledImagesMixin


class LlavaNextMultiModalProcessor(CropTiledProcessorMixin, stock.LlavaNextMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor,
    info=stock.LlavaNextProcessingInfo,
    dummy_inputs=stock.LlavaDummyInputsBuilder,
)
class LlavaNextForConditionalGeneration(
    TiledImagesMixin, stock.LlavaNextForConditionalGeneration, SupportsMRoPE
):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    def merge_tiles(self, size: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """As upstream's `_process_image_input`."""
        upstream: Any = super()
        merged: torch.Tensor = upstream._merge_image_patch_embeddings(size, tiles, strategy="spatial_unpad")
        return merged
