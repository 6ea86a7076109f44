# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL with a mixture of experts, over vllm/model_executor/models/qwen3_vl_moe.py."""

from vllm.model_executor.models import qwen3_vl_moe as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.qwen3_vl import DeepstackMixin, Qwen3VLMultiModalProcessor


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor,
    info=stock.Qwen3VLMoeProcessingInfo,
    dummy_inputs=stock.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoeForConditionalGeneration(DeepstackMixin, stock.Qwen3VLMoeForConditionalGeneration):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""
