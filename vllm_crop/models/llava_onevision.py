# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision with pruning of its images, over vllm/model_executor/models/llava_onevision.py.

Videos pass through untouched.
"""

from typing import Any

import torch
from vllm.model_executor.models import llava_onevision as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.tiled import CropTiledProcessorMixin, TiledImagesMixin


class LlavaOnevisionMultiModalProcessor(CropTiledProcessorMixin, stock.LlavaOnevisionMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionMultiModalProcessor,
    info=stock.LlavaOnevisionProcessingInfo,
    dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionForConditionalGeneration(
    TiledImagesMixin, stock.LlavaOnevisionForConditionalGeneration, SupportsMRoPE
):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    def merge_tiles(self, size: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """As upstream's `_process_image_input`."""
        upstream: Any = super()
        merged: torch.Tensor = upstream._merge_image_patch_embeddings(
            size, tiles, image_newline=self.image_newline, strategy="spatial_unpad"
        )
        return merged
