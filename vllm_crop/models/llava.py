# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 with pre-LLM compression, over vllm/model_executor/models/llava.py."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import llava as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_crop.eviction.decoder import DroppingStep
from vllm_crop.eviction.model import start_eviction
from vllm_crop.models.compressing import CompressingEncoder
from vllm_crop.models.positions import original_positions
from vllm_crop.models.processing import CropProcessorMixin


class LlavaMultiModalProcessor(CropProcessorMixin, stock.LlavaMultiModalProcessor):
    """The stock processor, with planned placeholder counts."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor,
    info=stock.LlavaProcessingInfo,
    dummy_inputs=stock.LlavaDummyInputsBuilder,
)
class LlavaForConditionalGeneration(stock.LlavaForConditionalGeneration, SupportsMRoPE):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names.

    M-RoPE is how vLLM lets a model choose position ids: used with `position_ids: "original"` only, when
    frontend/hf_overrides.py switches it on. The language model keeps its plain RoPE.
    """

    supports_encoder_cudagraph = False  # a captured encoder would bypass embed_multimodal

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.crop_encoder = CompressingEncoder(vllm_config, self.encode_images)
        self.eviction = start_eviction(self, vllm_config)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision tower and projector: `[images, 3, height, width]` -> `[images, num_tokens, hidden]`."""
        return super().embed_multimodal(pixel_values=pixel_values)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of a batch of images, one `[num_embeddings, hidden]` tensor per image."""
        if kwargs.get("pixel_values") is None:  # image embeddings from the client are never compressed
            return super().embed_multimodal(**kwargs)
        return self.crop_encoder(**kwargs)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> Any:
        """Position ids of the unpruned prompt, `[3, num_tokens]` with equal rows, and their excess."""
        return original_positions(len(input_tokens), mm_features, self.crop_encoder.num_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        dropping: DroppingStep | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with one row of M-RoPE positions where there are three; in stages if rows go."""
        positions = positions if positions.ndim == 1 else positions[0]
        embeds = kwargs.get("inputs_embeds")
        in_stages = self.eviction is not None and (dropping is not None or self.eviction.runs_all_steps)
        if not in_stages or embeds is None:  # no embeddings where the server takes no images
            return super().forward(input_ids, positions, *args, **kwargs)
        assert self.eviction is not None
        return self.eviction.run(dropping, embeds, positions)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As upstream; cached features belong to the old weights."""
        self.crop_encoder.cache.clear()
        return super().load_weights(weights)
