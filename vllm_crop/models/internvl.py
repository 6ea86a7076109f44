# SPDX-License-Identifier: Apache-2.0
"""InternVL as OpenGVLab publishes it with pruning of its images, over vllm/model_executor/models/internvl.py.

Videos pass through untouched.
"""

from collections.abc import Sequence

from vllm.model_executor.models import internvl as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.models.internvl_tiles import InternVLImagesMixin
from vllm_crop.models.processor import CropProcessorMixin

_PLACE = "<image>"


class InternVLMultiModalProcessor(CropProcessorMixin, stock.InternVLMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""

    beside_image = 2  # <img> and </img>
    place_length = len(_PLACE)  # its letters

    def num_places(self, prompt: Sequence[int]) -> int:
        """How many times the prompt says `<image>`, which is no token: its letters may be in any."""
        text: str = self.info.get_tokenizer().decode(list(prompt))
        return text.count(_PLACE)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLMultiModalProcessor,
    info=stock.InternVLProcessingInfo,
    dummy_inputs=stock.InternVLDummyInputsBuilder,
)
class InternVLChatModel(InternVLImagesMixin, stock.InternVLChatModel, SupportsMRoPE):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    pixels = "pixel_values_flat"
