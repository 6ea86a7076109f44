# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, 4.5V and 4.6V with pruning of their images, over vllm/model_executor/models/glm4_1v.py.

A video's frames stand in the prompt as images do, under the same token id. They are one item of another
modality, though, and what is done with images here is done item by item.
"""

from vllm.model_executor.models import glm4_1v as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.qwen_vl import CropQwenVLMixin, CropQwenVLProcessorMixin


class Glm4vMultiModalProcessor(CropQwenVLProcessorMixin, stock.Glm4vMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vMultiModalProcessor,
    info=stock.Glm4vProcessingInfo,
    dummy_inputs=stock.Glm4vDummyInputsBuilder,
)
class Glm4vForConditionalGeneration(CropQwenVLMixin, stock.Glm4vForConditionalGeneration):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vMultiModalProcessor,
    info=stock.Glm4vProcessingInfo,
    dummy_inputs=stock.Glm4vDummyInputsBuilder,
)
class Glm4vMoeForConditionalGeneration(CropQwenVLMixin, stock.Glm4vMoeForConditionalGeneration):
    """The same with a mixture of experts."""
