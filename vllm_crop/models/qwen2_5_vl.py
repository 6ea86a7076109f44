# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL with pruning of its images, over vllm/model_executor/models/qwen2_5_vl.py."""

from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.qwen_vl import CropQwenVLMixin, CropQwenVLProcessorMixin


class Qwen2_5_VLMultiModalProcessor(CropQwenVLProcessorMixin, stock.Qwen2_5_VLMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLMultiModalProcessor,
    info=stock.Qwen2_5_VLProcessingInfo,
    dummy_inputs=stock.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VLForConditionalGeneration(CropQwenVLMixin, stock.Qwen2_5_VLForConditionalGeneration):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""
