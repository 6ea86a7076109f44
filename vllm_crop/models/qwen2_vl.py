# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL with pruning of its images, over vllm/model_executor/models/qwen2_vl.py."""

from vllm.model_executor.models import qwen2_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.qwen_vl import CropQwenVLMixin, CropQwenVLProcessorMixin


class Qwen2VLMultiModalProcessor(CropQwenVLProcessorMixin, stock.Qwen2VLMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLMultiModalProcessor,
    info=stock.Qwen2VLProcessingInfo,
    dummy_inputs=stock.Qwen2VLDummyInputsBuilder,
)
class Qwen2VLForConditionalGeneration(CropQwenVLMixin, stock.Qwen2VLForConditionalGeneration):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""
