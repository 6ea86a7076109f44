# SPDX-License-Identifier: Apache-2.0
"""BTP, balanced token pruning (Li et al., NeurIPS 2025, arXiv 2505.22038; after excerpts and a review).

Tokens leave in stages. Each stage keeps some for what later layers may need, tokens far from one another, and
some for its own layer, those that the last token attends to; the share of the latter rises with the depth.
Attention prefers late positions, so more tokens than needed are taken by attention and the earlier of them
stay.

Deviations: where a small calibration set finds stages in the paper, they are configurations here; how the two
goals are weighed into one set is our reading: the attended ones are taken first, and the others are added one
by one, each the farthest from all that are taken. A first stage at layer 0 is before the language model,
where nothing is attended to yet: in a model of twelve layers a full one is dear. The spread of the first
tokens by their distance on the grid is left out, as attended tokens begin the set.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.rivals.budgets import scaled, stages_from_the_start
from lab.evaluation.rivals.divprune import with_farthest
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Seen, top

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "2, 5, 9, shares 0.2 to 0.8": {},
    "1, 4, 8, shares 0.2 to 0.8": {"layers": [1, 4, 8]},
    "1, 4, 8, shares 0.2 to 0.8, no rebalance": {"layers": [1, 4, 8], "spare": 0.0},
    "1, 4, 8, shares 0 to 1": {"layers": [1, 4, 8], "shares": [0.0, 0.5, 1.0]},
    "1, 4, 8, shares 0 to 0.5": {"layers": [1, 4, 8], "shares": [0.0, 0.25, 0.5]},
    "1, 4, 8, shares 0 to 1, no rebalance": {"layers": [1, 4, 8], "shares": [0.0, 0.5, 1.0], "spare": 0.0},
    "1, 4, shares 0 and 1": {"layers": [1, 4], "shares": [0.0, 1.0], "ratio": 0.25},
    "1, 4, shares 0 and 1, no rebalance": {
        "layers": [1, 4],
        "shares": [0.0, 1.0],
        "ratio": 0.25,
        "spare": 0.0,
    },
    "1, 8, shares 0 and 1": {"layers": [1, 8], "shares": [0.0, 1.0]},
    "1, 8, shares 0 and 1, no rebalance": {"layers": [1, 8], "shares": [0.0, 1.0], "spare": 0.0},
    "1, 8, shares 0 and 0.5": {"layers": [1, 8], "shares": [0.0, 0.5]},
    "1, share 0": {"layers": [1], "shares": [0.0]},
    "1, share 0.2": {"layers": [1], "shares": [0.2]},
    "1, share 0.5": {"layers": [1], "shares": [0.5]},
    "1, 8, a third, shares 0 and 1, no rebalance": {
        "layers": [1, 8],
        "shares": [0.0, 1.0],
        "ratio": 1 / 3,
        "spare": 0.0,
    },
    "2, 8, shares 0 and 1, no rebalance": {"layers": [2, 8], "shares": [0.0, 1.0], "spare": 0.0},
    "before and 8, shares 0 and 1": {"layers": [0, 8], "shares": [0.0, 1.0]},
    "before and 8, shares 0 and 1, no rebalance": {"layers": [0, 8], "shares": [0.0, 1.0], "spare": 0.0},
    "before and 8, a third, shares 0 and 1, no rebalance": {
        "layers": [0, 8],
        "shares": [0.0, 1.0],
        "ratio": 1 / 3,
        "spare": 0.0,
    },
    "before, 4 and 8, shares 0 to 1": {"layers": [0, 4, 8], "shares": [0.0, 0.5, 1.0]},
}


def balance(attention: Tensor, states: Tensor, count: int, share: float, spare: float) -> Tensor:
    """`count` ascending indices.

    Args:
        attention: `[tokens]` that the last token pays.
        states: `[tokens, hidden]`.
        share: of the count that goes by attention.
        spare: how much more is taken by attention, of which the earlier ones stay.
    """
    attended = round(count * share)
    chosen = top(attention, min(len(attention), math.ceil(attended * (1 + spare))))[:attended].tolist()
    directions = normalize(states, dim=-1)
    distance = 1 - directions @ directions.T
    if not chosen:
        chosen = [int(distance.sum(0).argmax())]
    return torch.tensor(sorted(with_farthest(distance, chosen, count)[:count]), dtype=torch.long)


def btp(
    num_tokens: int,
    num_layers: int,
    rate: float,
    layers: Sequence[int] = (2, 5, 9),
    shares: Sequence[float] = (0.2, 0.5, 0.8),
    ratio: float = 0.5,
    spare: float = 0.5,
) -> Pruning:
    """BTP at a pruning rate.

    Args:
        layers: at which tokens leave; 0: before the first one.
        shares: what goes by attention at each of them.
        ratio: of each stage's count to the one before it.
        spare: see `balance`.
    """
    first = 0
    if layers[0] == 0:
        first, left = stages_from_the_start(
            num_tokens, rate, num_layers, layers[1:], [ratio] * (len(layers) - 1)
        )
    else:
        left = scaled(num_tokens, rate, num_layers, tuple(layers), [ratio**at for at in range(len(layers))])
    share_at = dict(zip(layers, shares, strict=True))

    def choose(view: LayerView, count: int) -> Tensor:
        attention = view.last_word_attention()
        states = view.image_rows.hidden.expand(len(attention), -1, -1)
        share = share_at[view.layer]
        return torch.stack(
            [balance(one, rows, count, share, spare) for one, rows in zip(attention, states, strict=True)]
        )

    def before(image: Seen) -> Kept:
        unasked = torch.zeros(len(image.features))
        return Kept.choose(image.features, balance(unasked, image.features, first, 0.0, 0.0)[None])

    return Pruning((lambda sight: before(sight.image)) if first else None, left, choose)
