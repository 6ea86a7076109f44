# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT with pruning, over vllm/model_executor/models/llava_next.py."""

from vllm.model_executor.models import llava_next as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.processor import CropProcessorMixin
from vllm_crop.models.tiled import TiledImagesMixin


class LlavaNextMultiModalProcessor(CropProcessorMixin, stock.LlavaNextMultiModalProcessor):
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
