# SPDX-License-Identifier: Apache-2.0
"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967; after the authors' code).

A determinantal point process over the visual tokens with the kernel diag(r) L diag(r): L are the cosines
between tokens, r a token's relevance to the question, min-max normalised. Its most likely subset is found
greedily (Chen et al. 2018). With theta, relevance r becomes exp(alpha r), alpha = theta / (2 (1 - theta)).

Deviations: without a text encoder of the vision tower's own, relevance is the mean cosine with the embeddings
of the question's words. Of CLIP's cosines the authors take the negative, as images that fit are further from
their words there: that is a configuration. A small ridge is added, as more tokens may be kept than features
have dimensions.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Sight
from vllm_crop.planning.budget import retained_count

_LEAST = 1e-6
_RIDGE = 1e-4
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "as published": {},
    "negative cosine": {"sign": -1},
    "theta 0.3": {"theta": 0.3},
    "theta 0.5": {"theta": 0.5},
    "theta 0.8": {"theta": 0.8},
    "theta 0.95": {"theta": 0.95},
    "negative cosine, theta 0.5": {"sign": -1, "theta": 0.5},
    "features of the tower": {"tower": True},
    "features of the tower, theta 0.5": {"tower": True, "theta": 0.5},
    "features of the tower, negative cosine": {"tower": True, "sign": -1},
    "no relevance": {"theta": 0.0},
}


def relevance(features: Tensor, words: Tensor, sign: int = 1, theta: float | None = None) -> Tensor:
    """`[tokens]` above 0: how close tokens are to the words of a question; with theta 0 all are the same."""
    close = sign * (normalize(features, dim=-1) @ normalize(words, dim=-1).T).mean(-1)
    scaled = (close - close.min() + _LEAST) / (close.max() - close.min() + _LEAST)
    return scaled if theta is None else (scaled * theta / (2 * (1 - theta))).exp()


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


def choose(sight: Sight, count: int, sign: int, theta: float | None, tower: bool) -> Kept:
    """For every question the tokens that are relevant to it and differ from each other."""
    image = sight.image
    directions = normalize((image.tower if tower else image.features).double(), dim=-1)
    similar = directions @ directions.T + _RIDGE * torch.eye(len(directions))
    relevant = torch.stack([relevance(image.features, words, sign, theta) for words in sight.words])
    kernel = relevant[:, :, None] * similar * relevant[:, None, :]
    return Kept.choose(image.features, most_likely(kernel, count))


def cdpruner(
    num_tokens: int,
    num_layers: int,
    rate: float,
    sign: int = 1,
    theta: float | None = None,
    tower: bool = False,
) -> Pruning:
    """CDPruner at a pruning rate.

    Args:
        sign: of the cosine that is relevance.
        theta: the authors' weight of relevance; None: as in the kernel above.
        tower: tokens are compared as the tower has seen them, before they are merged.
    """
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: choose(sight, count, sign, theta, tower))
