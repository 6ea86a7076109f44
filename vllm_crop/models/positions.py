# SPDX-License-Identifier: Apache-2.0
"""Position ids of a compressed prompt as they were before compression."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_crop.models.plan_fields import ASSIGNMENT, POSITIONS

MRopePositions = Callable[[list[int], list[Any]], tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class UnprunedPrompt:
    """What a compressed prompt would have been.

    Attributes:
        num_tokens: its length.
        survivors: `[tokens of the compressed prompt]`, where in it each of them is.
        features: vLLM's MultiModalFeatureSpec list with placeholders of full length.
    """

    num_tokens: int
    survivors: torch.Tensor
    features: list[Any]


def unpruned_prompt(num_tokens: int, mm_features: Sequence[Any]) -> UnprunedPrompt:
    """Undo the compression of a prompt with `num_tokens` tokens; `mm_features` come in any order."""
    survivors: list[torch.Tensor] = []
    features: list[Any] = []
    start, shift = 0, 0
    for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
        place = feature.mm_position
        survivors.append(torch.arange(start, place.offset) + shift)
        within, full_length = _within_image(feature)
        survivors.append(within + place.offset + shift)
        full = replace(place, offset=place.offset + shift, length=full_length)
        features.append(replace(feature, mm_position=full))
        start = place.offset + place.length
        shift += full_length - place.length
    survivors.append(torch.arange(start, num_tokens) + shift)
    return UnprunedPrompt(num_tokens + shift, torch.cat(survivors), features)


def _within_image(feature: Any) -> tuple[torch.Tensor, int]:
    """The tokens of an image (or video) that are left, and how many there were."""
    length = feature.mm_position.length
    if POSITIONS not in feature.data or not len(feature.data[POSITIONS].data):
        return torch.arange(length), length
    return feature.data[POSITIONS].data.long(), len(feature.data[ASSIGNMENT].data)


def original_positions(num_tokens: int, mm_features: Sequence[Any]) -> tuple[torch.Tensor, int]:
    """What a model with 1-D RoPE would number the tokens that are left.

    Returns:
        `[3, num_tokens]` with equal rows, and how far the next position is beyond `num_tokens`.
    """
    unpruned = unpruned_prompt(num_tokens, mm_features)
    return unpruned.survivors.expand(3, -1).clone(), unpruned.num_tokens - num_tokens


def original_mrope_positions(
    input_tokens: list[int], mm_features: Sequence[Any], unpruned_positions: MRopePositions
) -> tuple[torch.Tensor, int]:
    """What a model with M-RoPE would number the tokens that are left.

    Args:
        input_tokens: the compressed prompt; answered tokens may follow it.
        unpruned_positions: the family's own numbering.

    Returns:
        `[3, num_tokens]`, and how far the next position is beyond `num_tokens`.
    """
    unpruned = unpruned_prompt(len(input_tokens), mm_features)
    tokens = [0] * unpruned.num_tokens
    for index, token in zip(unpruned.survivors.tolist(), input_tokens, strict=True):
        tokens[index] = token
    positions, beyond = unpruned_positions(tokens, unpruned.features)
    return positions[:, unpruned.survivors], beyond + unpruned.num_tokens - len(input_tokens)
