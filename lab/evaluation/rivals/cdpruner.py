# SPDX-License-Identifier: Apache-2.0
"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967).

A determinantal point process over the visual tokens with the kernel diag(r) L diag(r): L are the cosines
between tokens, r a token's relevance to the question, min-max normalised. Its most likely subset is found
greedily (Chen et al. 2018). Without a text encoder of the vision tower's own, relevance is the mean cosine
with the embeddings of the question's words.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Sight
from vllm_crop.planning.budget import retained_count

_LEAST = 1e-6
_RIDGE = 1e-4  # more tokens may be kept than the embeddings have dimensions; then the relevant ones are


def relevance(features: Tensor, words: Tensor) -> Tensor:
    """`[tokens]` in (0, 1]: how close tokens are to the words of a question."""
    close = (normalize(features, dim=-1) @ normalize(words, dim=-1).T).mean(-1)
    return (close - close.min() + _LEAST) / (close.max() - close.min() + _LEAST)


def most_likely(kernel: Tensor, count: int) -> Tensor:
    """Greedy maximum of the determinant: `[batch, n, n]` -> indices `[batch, count]` in the order chosen."""
    rows = torch.arange(len(kernel))
    gains = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_zeros(len(kernel), count, kernel.shape[1])
    chosen = torch.empty(len(kernel), count, dtype=torch.long)
    for step in range(count):
        best = gains.argmax(-1)
        chosen[:, step] = best
        known = (factors[rows, :step, best][:, None] @ factors[:, :step])[:, 0]
        factors[:, step] = (kernel[rows, best] - known) / gains[rows, best].sqrt()[:, None]
        gains = gains - factors[:, step] ** 2
        gains[rows[:, None], chosen[:, : step + 1]] = float("-inf")
    return chosen


def choose(sight: Sight, count: int) -> Kept:
    """For every question the tokens that are relevant to it and differ from each other."""
    directions = normalize(sight.image.features.double(), dim=-1)
    similar = directions @ directions.T + _RIDGE * torch.eye(len(directions))
    relevant = torch.stack([relevance(sight.image.features, words) for words in sight.words])
    kernel = relevant[:, :, None] * similar * relevant[:, None, :]
    return Kept.choose(sight.image.features, most_likely(kernel, count))


def cdpruner(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """CDPruner at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: choose(sight, count))
