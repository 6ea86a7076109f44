# SPDX-License-Identifier: Apache-2.0
"""InternVL in transformers' format with pruning of its images, over vllm/model_executor/models/interns1.py.

Videos pass through untouched.
"""

from typing import Any

from vllm.model_executor.models import interns1 as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.models.internvl_tiles import InternVLImagesMixin
from vllm_crop.models.processor import CropProcessorMixin


class InternS1MultiModalProcessor(CropProcessorMixin, stock.InternS1MultiModalProcessor):
    """The stock processor, with planned placeholder counts."""

    beside_image = 2  # <img> and </img>

    def image_processor_settings(self) -> dict[str, Any]:
        """As elsewhere.

        Raises:
            UnsupportedModelError: the server was told to make no tiles.
        """
        settings = super().image_processor_settings()
        told = self.info.ctx.get_merged_mm_kwargs({})
        if not {**told, **told.get("images_kwargs", {})}.get("crop_to_patches", True):
            raise UnsupportedModelError(
                "--mm-processor-kwargs crop_to_patches=false is not supported: say max_patches=1 instead"
            )
        return settings


@MULTIMODAL_REGISTRY.register_processor(
    InternS1MultiModalProcessor,
    info=stock.InternS1ProcessingInfo,
    dummy_inputs=stock.InternS1DummyInputsBuilder,
)
class InternVLForConditionalGeneration(
    InternVLImagesMixin, stock.InternS1ForConditionalGeneration, SupportsMRoPE
):
    """The stock model, fed compressed embeddings. Named as its checkpoints name it."""
