# SPDX-License-Identifier: Apache-2.0
"""Position ids of a compressed prompt as they were before compression, for 1-D RoPE models."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_crop.models.plan_fields import POSITIONS


def original_positions(
    num_tokens: int, mm_features: Sequence[Any], tokens_per_image: int
) -> tuple[torch.Tensor, int]:
    """What the unpruned prompt would number each surviving token.

    Args:
        num_tokens: length of the compressed prompt.
        mm_features: vLLM's MultiModalFeatureSpec list, in prompt order.
        tokens_per_image: visual tokens of an unpruned image.

    Returns:
        `[3, num_tokens]` with equal rows, and how far the next position is beyond `num_tokens`.
    """
    chunks: list[torch.Tensor] = []
    start, shift = 0, 0
    for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
        offset, length = feature.mm_position.offset, feature.mm_position.length
        chunks.append(torch.arange(start, offset) + shift)
        positions = feature.data[POSITIONS].data
        within = positions.long() if len(positions) else torch.arange(length)
        chunks.append(within + offset + shift)
        start = offset + length
        shift += tokens_per_image - length if len(positions) else 0
    chunks.append(torch.arange(start, num_tokens) + shift)
    return torch.cat(chunks).expand(3, -1).clone(), shift
