# SPDX-License-Identifier: Apache-2.0
"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175, algorithm 1; as the authors' code).

The max-min diversity problem, greedily: the first token is the one whose nearest neighbour is farthest, each
further one the token farthest from all chosen so far. Distance is one minus the cosine of the embeddings.

Deviation: tokens keep their positions, where the authors number them anew. There is nothing to configure.

With attention, of no paper: more tokens are kept before the language model, and the last token's attention
leaves fewer of them later. The simplest of methods in two stages.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.rivals.budgets import two_stages
from lab.evaluation.runner.method import Kept, Pruning, top
from vllm_crop.planning.budget import retained_count

ATTENTION_CONFIGURATIONS: dict[str, dict[str, float]] = {
    "40 % stay at two thirds": {},
    "a third at the middle": {"depth": 1 / 2, "ratio": 1 / 3},
    "half at the middle": {"depth": 1 / 2, "ratio": 0.5},
    "a third at two thirds": {"ratio": 1 / 3},
    "half at two thirds": {"ratio": 0.5},
    "a quarter at two thirds": {"ratio": 0.25},
    "a third at a third": {"depth": 1 / 3, "ratio": 1 / 3},
    "half at a third": {"depth": 1 / 3, "ratio": 0.5},
    "40 % at three quarters": {"depth": 3 / 4},
}


def most_diverse(features: Tensor, count: int) -> Tensor:
    """Indices of `count` of `[tokens, hidden]`, in the order chosen."""
    directions = normalize(features, dim=-1)
    distance = 1 - directions @ directions.T
    others = distance + torch.diag(torch.full((len(features),), float("inf")))
    return torch.tensor(with_farthest(distance, [int(others.min(dim=0).values.argmax())], count))


def with_farthest(distance: Tensor, chosen: list[int], count: int) -> list[int]:
    """`count` indices of `[tokens, tokens]`: those chosen, then one by one the farthest from all before."""
    found = list(chosen)
    nearest = distance[found].min(0).values
    nearest[found] = float("-inf")
    while len(found) < count:
        found.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[found[-1]])
        nearest[found[-1]] = float("-inf")
    return found


def divprune(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """DivPrune at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: _keep(sight.image.features, count))


def divprune_attention(
    num_tokens: int, num_layers: int, rate: float, depth: float = 2 / 3, ratio: float = 0.4
) -> Pruning:
    """DivPrune before the language model, attention inside it, at a pruning rate.

    Args:
        depth: where in the language model tokens leave.
        ratio: of those left behind it to those before it.
    """
    first, later = two_stages(num_tokens, rate, num_layers, round(num_layers * depth), ratio)
    return Pruning(
        lambda sight: _keep(sight.image.features, first),
        later,
        lambda view, count: top(view.last_word_attention(), count),
    )


def _keep(features: Tensor, count: int) -> Kept:
    return Kept.choose(features, most_diverse(features, count)[None])
