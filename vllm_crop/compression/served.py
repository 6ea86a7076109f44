# SPDX-License-Identifier: Apache-2.0
"""A compressor where a model runs: loaded beside its weights, its memory known before there are KV blocks.

Every tensor-parallel rank has all of it and computes the same.
"""

import torch

from vllm_crop.compression.settings import ResamplerConfig, ResamplerError
from vllm_crop.compression.weights import load_resampler


class ServedResampler:
    """Compresses images of a served model."""

    def __init__(self, config: ResamplerConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        """Load the weights that a server's settings name.

        Raises:
            ResamplerError: they are not those it was started with.
        """
        loaded = load_resampler(config, dtype)
        # For `restore`: whoever takes the device's memory away takes the weights along.
        self._kept = {name: part.clone() for name, part in loaded.state_dict().items()}
        self.module = loaded.to(device)
        self.rehearsed = False

    def restore(self) -> None:
        """Bring the weights back, of a model whose own are loaded once more (vLLM's sleep mode, level 2)."""
        self.module.load_state_dict(self._kept)

    @torch.inference_mode()
    def __call__(
        self, features: torch.Tensor, assignment: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Compress an image.

        Args:
            features: `[num_tokens, feature_size]`.
            assignment, places: as `vllm_crop.compression.reading.plan_reading` takes them.

        Returns:
            `[num_embeddings, feature_size]`.
        """
        self._require_width(features)
        embeddings: torch.Tensor = self.module(features, assignment, places)
        return embeddings

    def rehearse(self, num_tokens: int) -> None:
        """Take as much memory as can be needed, once, when vLLM shows the model its largest items.

        It measures what these take before it gives the rest of memory to the KV cache, and nothing is to be
        compressed in them. On a CPU it measures nothing.

        Args:
            num_tokens: of the largest image.
        """
        if self.rehearsed:
            return
        self.rehearsed = True
        weight = self.module.norm.weight
        if num_tokens and weight.device.type != "cpu":
            self(weight.new_zeros(num_tokens, len(weight)), *worst_case(num_tokens))

    def _require_width(self, features: torch.Tensor) -> None:
        wanted = self.module.norm.normalized_shape[0]
        if features.shape[-1] != wanted:
            raise ResamplerError(
                f"the compressor is for features of {wanted} columns, and this model's have "
                f"{features.shape[-1]}"
            )


def worst_case(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Assignment and places of the image that takes most: one zone, and all tokens but one are queries."""
    tokens = torch.arange(num_tokens)
    nowhere = torch.zeros_like(tokens)
    # The first is left out, so that there are no anchors.
    return tokens - 1, torch.stack([nowhere, nowhere, nowhere, tokens], dim=1)
