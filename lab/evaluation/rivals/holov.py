# SPDX-License-Identifier: Apache-2.0
"""HoloV (Zou et al., NeurIPS 2025, arXiv 2510.02912; after the authors' code).

The tokens are cut into chunks, in their order. Chunks get tokens in proportion to their mean scores, and
inside a chunk those with most attention stay. A token's score is its attention plus 0.09 times how much its
cosines with the others of its chunk vary, which the code scales to the chunk's mean attention. So the mean
score of a chunk is 1.09 times its mean attention, and variance decides nothing: it is left out here.

Deviations: without a class token, attention is the mean over all queries. Where a chunk is given more tokens
than it has, the authors fill up with zeros: here the surplus goes to the tokens with most attention. The
number of chunks is an argument of theirs whose value we do not know for such an image.
"""

import torch
from torch import Tensor

from lab.evaluation.runner.method import Kept, Pruning, top
from vllm_crop.planning.budget import retained_count

CONFIGURATIONS = {f"{chunks} chunks": {"chunks": chunks} for chunks in (16, 1, 4, 8, 12, 24, 32, 48, 64, 96)}


def allotted(scores: Tensor, count: int) -> list[int]:
    """Of `count` tokens a part for every chunk, in proportion to their scores."""
    weights = scores / scores.sum()
    parts = (weights * count).floor().long()
    for index in weights.argsort(descending=True, stable=True)[: count - int(parts.sum())]:
        parts[index] += 1
    return [int(part) for part in parts]


def holistic(received: Tensor, count: int, chunks: int) -> Tensor:
    """`count` indices of the attention `[tokens]` that each receives."""
    pieces = torch.arange(len(received)).tensor_split(chunks)
    scores = torch.stack([received[piece].mean() for piece in pieces])
    first = torch.zeros_like(received)
    for piece, part in zip(pieces, allotted(scores, count), strict=True):
        first[piece[top(received[piece], min(part, len(piece)))]] = 2.0  # attention is below one
    return top(received + first, count)


def holov(num_tokens: int, num_layers: int, rate: float, chunks: int = 16) -> Pruning:
    """HoloV at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(
        lambda sight: Kept.choose(sight.image.features, holistic(sight.image.received, count, chunks)[None])
    )
