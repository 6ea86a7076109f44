# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL with pruning of its images, over vllm/model_executor/models/qwen3_vl.py.

A visual token's features are its embedding and, along the hidden dimension, what deepstack adds to its row
after each of the first decoder layers: compressed and cached together, they stay together.
"""

from typing import Any

import torch
from vllm.model_executor.models import qwen3_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.eviction.decoder import EvictingDecoder, EvictingStep
from vllm_crop.models.qwen_vl import CropQwenVLMixin, CropQwenVLProcessorMixin


class Qwen3VLMultiModalProcessor(CropQwenVLProcessorMixin, stock.Qwen3VLMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""

    def image_processor_settings(self) -> dict[str, Any]:
        """As elsewhere, but one edge of `size` is enough: upstream takes the other from the checkpoint."""
        settings = super().image_processor_settings()
        own = self.info.get_hf_processor().image_processor.to_dict()
        return {**settings, "size": {**own["size"], **settings["size"]}}


class DeepstackMixin(CropQwenVLMixin):
    """Mixed in front of a model of this file's upstream, dense or not."""

    def run_in_stages(
        self,
        eviction: EvictingDecoder,
        evicting: EvictingStep | None,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> Any:
        """With this step's deepstack rows, which upstream keeps in buffers and clears after use."""
        upstream: Any = super()
        num_tokens = len(inputs_embeds)
        added = upstream._get_deepstack_input_embeds(num_tokens)
        hidden_states = eviction.run(evicting, inputs_embeds, positions, added)
        upstream._clear_deepstack_input_embeds(num_tokens)
        return hidden_states

    def forget_step(self, num_tokens: int) -> None:
        """Clear the deepstack rows: the next step would add them to its own."""
        upstream: Any = super()
        upstream._clear_deepstack_input_embeds(num_tokens)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor,
    info=stock.Qwen3VLProcessingInfo,
    dummy_inputs=stock.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLForConditionalGeneration(DeepstackMixin, stock.Qwen3VLForConditionalGeneration):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""
