# SPDX-License-Identifier: Apache-2.0
"""What every family's model does with plans: compress, run the language model in stages."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_crop.eviction.decoder import DroppingStep, EvictingDecoder
from vllm_crop.eviction.model import start_eviction
from vllm_crop.models.compressing import CompressingEncoder


class PrunedModelMixin(nn.Module):
    """Mixed in front of a vision-language model of vLLM that has `language_model.model`, the decoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.crop_encoder = CompressingEncoder(vllm_config)
        self.eviction = start_eviction(self, vllm_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        dropping: DroppingStep | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream; in stages if rows go."""
        embeds = kwargs.get("inputs_embeds")
        in_stages = self.eviction is not None and (dropping is not None or self.eviction.runs_all_steps)
        if dropping is not None and (embeds is None or self.eviction is None):
            # All rows would run with attention metadata of fewer.
            raise RuntimeError("a step that evicts visual tokens came without its embeddings")
        if not in_stages or embeds is None:  # no embeddings where the server takes no images
            stock: Any = super()
            return stock.forward(input_ids, positions, *args, **kwargs)
        assert self.eviction is not None
        return self.run_in_stages(self.eviction, dropping, embeds, positions)

    def run_in_stages(
        self,
        eviction: EvictingDecoder,
        dropping: DroppingStep | None,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> Any:
        """A forward pass in stages; for families whose layers take more than embeddings."""
        return eviction.run(dropping, inputs_embeds, positions)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As upstream; cached features belong to the old weights."""
        self.crop_encoder.cache.clear()
        stock: Any = super()
        loaded: set[str] = stock.load_weights(weights)
        return loaded
