# SPDX-License-Identifier: Apache-2.0
"""Models whose language model has plain, 1-D RoPE: position ids can be those of the unpruned prompt."""

from typing import Any

import torch

from vllm_crop.eviction.decoder import DroppingStep
from vllm_crop.models.positions import original_positions
from vllm_crop.models.pruned import PrunedModelMixin


class PlainRopeMixin(PrunedModelMixin):
    """PrunedModelMixin for plain RoPE; the model class has SupportsMRoPE as its last base.

    M-RoPE is how vLLM lets a model choose position ids: used with `position_ids: "original"` only, when
    frontend/hf_overrides.py switches it on. The language model keeps its plain RoPE.
    """

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> Any:
        """Position ids of the unpruned prompt, `[3, num_tokens]` with equal rows, and their excess."""
        return original_positions(len(input_tokens), mm_features)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        dropping: DroppingStep | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with one row of M-RoPE positions where there are three."""
        positions = positions if positions.ndim == 1 else positions[0]
        return super().forward(input_ids, positions, *args, dropping=dropping, **kwargs)
