# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 with pruning, over vllm/model_executor/models/llava.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models import llava as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.encoder import Encode, SeenImage
from vllm_crop.models.processor import CropProcessorMixin


class LlavaMultiModalProcessor(CropProcessorMixin, stock.LlavaMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor,
    info=stock.LlavaProcessingInfo,
    dummy_inputs=stock.LlavaDummyInputsBuilder,
)
class LlavaForConditionalGeneration(PlainRopeMixin, stock.LlavaForConditionalGeneration, SupportsMRoPE):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config
        self.tokens_per_image = geometry_from_configs(hf_config.to_dict(), {}).max_tokens

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """One tile of `[3, height, width]` per image."""
        tiles = kwargs["pixel_values"]

        def encode(picked: Sequence[int]) -> Any:
            return self.embed_stock(pixel_values=tiles[picked])

        return [SeenImage.whole(self.tokens_per_image)] * len(tiles), encode
