# SPDX-License-Identifier: Apache-2.0
"""VScan (Zhang et al., TMLR 2026, arXiv 2505.22654; after a review of the authors' code for Qwen2.5-VL).

Before the language model half of the tokens are the best of every window of four by four by the attention
received in the tower's first attention over the whole image, half the best of all others by that of the last.
Every token that leaves is averaged into the kept one whose features are most similar. In the middle of the
language model a third of these stays, by the attention of the last token, mean over heads; the code for Qwen
works it out without rotation.

Deviations: the first count is solved for the budget. Where windows have unequal parts, the better tokens come
first. tinyvqa's tower has one attention over the whole image, which is first and last.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.rivals.budgets import two_stages
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Seen, squares_of, top
from vllm_crop.planning.geometry import TokenGrid

WINDOW = 4
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "a third stays at the middle": {},
    "a third, rotated": {"rotated": True},
    "half, rotated": {"ratio": 0.5, "rotated": True},
    "half": {"ratio": 0.5},
    "a third at two thirds": {"depth": 2 / 3},
    "a third at two thirds, rotated": {"depth": 2 / 3, "rotated": True},
    "half at two thirds, rotated": {"depth": 2 / 3, "ratio": 0.5, "rotated": True},
    "40 % at two thirds, rotated": {"depth": 2 / 3, "ratio": 0.4, "rotated": True},
    "a third at a third, rotated": {"depth": 1 / 3, "rotated": True},
    "all local": {"local": 1.0},
    "all local, a third at two thirds, rotated": {"local": 1.0, "depth": 2 / 3, "rotated": True},
    "3 of 4 local": {"local": 0.75},
    "3 of 4 local, a third at two thirds, rotated": {"local": 0.75, "depth": 2 / 3, "rotated": True},
    "all local, nothing leaves later": {"local": 1.0, "ratio": 1.0},
    "nothing leaves later": {"ratio": 1.0},
    "a third at 7 of 12, rotated": {"depth": 7 / 12, "rotated": True},
    "40 % at 7 of 12, rotated": {"depth": 7 / 12, "ratio": 0.4, "rotated": True},
    "all local, 40 % at 7 of 12, rotated": {
        "local": 1.0,
        "depth": 7 / 12,
        "ratio": 0.4,
        "rotated": True,
    },
}


def scan(image: Seen, count: int, local: float) -> Tensor:
    """`count` ascending indices, the share `local` of them by windows."""
    by_window = round(count * local)
    chosen = best_of_windows(image.early, image.grid, by_window)
    others = image.received.clone()
    others[chosen] = float("-inf")
    return torch.cat([chosen, top(others, count - by_window)]).sort().values


def best_of_windows(scores: Tensor, grid: TokenGrid, count: int) -> Tensor:
    """`count` indices: the best of every window, then the second, and so on; of equals in rank the better."""
    window = squares_of(grid, WINDOW)
    place = torch.zeros_like(window)
    for one in range(int(window.max()) + 1):
        members = (window == one).nonzero()[:, 0]
        place[members[scores[members].argsort(descending=True, stable=True)]] = torch.arange(len(members))
    order = scores.argsort(descending=True, stable=True)
    return order[place[order].argsort(stable=True)][:count]


def merged(features: Tensor, kept: Tensor) -> Tensor:
    """Features of the kept tokens, those that leave averaged into the most similar of them."""
    directions = normalize(features, dim=-1)
    group = (directions @ directions[kept].T).argmax(-1)
    group[kept] = torch.arange(len(kept))
    member = torch.nn.functional.one_hot(group, len(kept)).to(features.dtype)
    return member.T @ features / member.sum(0)[:, None]


def choose(view: LayerView, count: int, rotated: bool) -> Tensor:
    """By the attention that the last token is about to pay."""
    return top(view.next_view(rotated).last_word_attention(), count)


def vscan(
    num_tokens: int,
    num_layers: int,
    rate: float,
    depth: float = 0.5,
    ratio: float = 1 / 3,
    local: float = 0.5,
    rotated: bool = False,
) -> Pruning:
    """VScan at a pruning rate.

    Args:
        depth: where in the language model tokens leave.
        ratio: of those left behind it to those before it; 1: none leaves there.
        local: share of the first choice that goes by windows.
        rotated: whether attention in the language model knows positions.
    """
    first, later = two_stages(num_tokens, rate, num_layers, round(num_layers * depth), ratio)

    def before(image: Seen) -> Kept:
        kept = scan(image, first, local)
        return Kept(merged(image.features, kept)[None], kept[None])

    return Pruning(lambda sight: before(sight.image), later, lambda view, count: choose(view, count, rotated))
