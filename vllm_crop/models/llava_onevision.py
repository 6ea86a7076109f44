# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision with pruning of its images, over vllm/model_executor/models/llava_onevision.py.

Videos pass through untouched.
"""

from vllm.model_executor.models import llava_onevision as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.processor import CropProcessorMixin
from vllm_crop.models.tiled import TiledImagesMixin


class LlavaOnevisionMultiModalProcessor(CropProcessorMixin, stock.LlavaOnevisionMultiModalProcessor):
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
