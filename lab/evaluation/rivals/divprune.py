# SPDX-License-Identifier: Apache-2.0
"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175, algorithm 1).

The max-min diversity problem, greedily: the first token is the one whose nearest neighbour is farthest, each
further one the token farthest from all chosen so far. Distance is one minus the cosine of the embeddings.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning
from vllm_crop.planning.budget import retained_count


def most_diverse(features: Tensor, count: int) -> Tensor:
    """Indices of `count` of `[tokens, hidden]`, in the order chosen."""
    directions = normalize(features, dim=-1)
    distance = 1 - directions @ directions.T
    others = distance + torch.diag(torch.full((len(features),), float("inf")))
    chosen = [int(others.min(dim=0).values.argmax())]
    nearest = distance[chosen[0]].clone()
    while len(chosen) < count:
        nearest[chosen[-1]] = float("-inf")
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.tensor(chosen)


def divprune(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """DivPrune at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: _keep(sight.image.features, count))


def _keep(features: Tensor, count: int) -> Kept:
    return Kept.choose(features, most_diverse(features, count)[None])
