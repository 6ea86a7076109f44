# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5, dense and with a mixture of experts, over vllm/model_executor/models/qwen3_5.py.

Three of four decoder layers are Gated DeltaNets, which read the prompt's rows in their order into a state of
constant size: a row that was pooled away is none they ever see.
"""

from vllm.model_executor.models import qwen3_5 as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.qwen3_vl import Qwen3VLMultiModalProcessor
from vllm_crop.models.qwen_vl import CropQwenVLMixin


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor,
    info=stock.Qwen3_5ProcessingInfo,
    dummy_inputs=stock.Qwen3VLDummyInputsBuilder,
)
class Qwen3_5ForConditionalGeneration(CropQwenVLMixin, stock.Qwen3_5ForConditionalGeneration):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor,
    info=stock.Qwen3_5MoeProcessingInfo,
    dummy_inputs=stock.Qwen3VLDummyInputsBuilder,
)
class Qwen3_5MoeForConditionalGeneration(CropQwenVLMixin, stock.Qwen3_5MoeForConditionalGeneration):
    """The same with a mixture of experts in every layer."""
