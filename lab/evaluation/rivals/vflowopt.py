# SPDX-License-Identifier: Apache-2.0
"""VFlowOpt (Yang et al., ICCV 2025, arXiv 2508.05211; after a review of the authors' code).

A token's score is the attention that it receives from the tokens that receive much themselves, more than
`threshold` times the mean, plus `entropy` times the softmax of the entropy of the grey levels it shows. The
best stay; those that leave are gathered by squares of `recycle` tokens, each square averaged by score into
its best token. Later, in the language model, the same score says which leave at a third and at two thirds.

Deviations: the authors search thresholds, weights and ratios by Bayesian optimisation of how little the last
state changes; here they are configurations, chosen by answers on the dev split as everybody's are. The first
count is solved for the budget, with recycled tokens in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lab.evaluation.rivals.budgets import stages_from_the_start
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Seen, squares_of, top

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "half stays twice, squares of 6": {},
    "half stays twice, squares of 8": {"recycle": 8},
    "half stays twice, nothing recycled": {"recycle": None},
    "half stays twice, no entropy": {"entropy": 0.0},
    "half stays twice, much entropy": {"entropy": 10.0},
    "half stays twice, all rows": {"threshold": 0.0},
    "half stays twice, few rows": {"threshold": 2.0},
    "half stays twice, much entropy, all rows": {"entropy": 10.0, "threshold": 0.0},
    "3 of 4 stay twice, much entropy, all rows": {
        "ratios": [0.75, 0.75],
        "entropy": 10.0,
        "threshold": 0.0,
    },
    "3 of 4 stay twice, squares of 6": {"ratios": [0.75, 0.75]},
    "3 of 4 stay twice, squares of 8": {"ratios": [0.75, 0.75], "recycle": 8},
    "3 of 4 stay twice, much entropy": {"ratios": [0.75, 0.75], "entropy": 10.0},
    "all stay in the model, squares of 6": {"ratios": []},
    "all stay in the model, squares of 8": {"ratios": [], "recycle": 8},
    "all stay in the model, squares of 4": {"ratios": [], "recycle": 4},
    "all stay in the model, nothing recycled": {"ratios": [], "recycle": None},
    "all stay in the model, much entropy": {"ratios": [], "entropy": 10.0},
    "all stay in the model, more entropy": {"ratios": [], "entropy": 100.0},
    "all stay in the model, all rows": {"ratios": [], "threshold": 0.0},
    "all stay in the model, squares of 4, more entropy": {"ratios": [], "entropy": 100.0, "recycle": 4},
}


def scores_of(image: Seen, threshold: float, entropy: float) -> Tensor:
    """`[tokens]`: attention received from those that matter, and what there is to see."""
    asking = image.received > threshold * image.received.mean()
    if not asking.any():
        asking = torch.ones_like(asking)
    return image.attention[asking].mean(0) + entropy * image.entropy.softmax(0)


def recycled(features: Tensor, scores: Tensor, leaving: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Of each square with tokens that leave their mean, weighed by score, and the best of them.

    Returns:
        `[squares, hidden]` features, and `[squares]` tokens whose places they take.
    """
    means, places = [], []
    for square in sorted(set(squares[leaving].tolist())):
        members = leaving[squares[leaving] == square]
        weights = scores[members] / scores[members].sum()
        means.append(weights @ features[members])
        places.append(members[scores[members].argmax()])
    return torch.stack(means), torch.stack(places)


class Flow:
    """Chooses before the language model and, by the same scores, inside it."""

    def __init__(self, first: int, threshold: float, entropy: float, recycle: int | None) -> None:
        self.first, self.threshold, self.entropy, self.recycle = first, threshold, entropy, recycle
        self.left = torch.empty(0)  # scores of what is still there

    def begin(self, image: Seen) -> Kept:
        """What the language model receives."""
        scores = scores_of(image, self.threshold, self.entropy)
        if self.recycle is None or self.first >= len(scores):
            kept = top(scores, self.first)
            self.left = scores[kept]
            return Kept.choose(image.features, kept[None])
        kept, away, squares = self._divide(scores, squares_of(image.grid, self.recycle))
        means, places = recycled(image.features, scores, away, squares)
        tokens, order = torch.cat([kept, places]).sort()
        self.left = scores[tokens]
        return Kept(torch.cat([image.features[kept], means])[order][None], tokens[None])

    def _divide(self, scores: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stays and what leaves, so that what stays and the squares of the rest are the first count.

        Squares of what leaves are fewer the more stays: from room for all of them it is a short way down.
        Where there is no room for all squares they are one.
        """
        room = int(squares.max()) + 1
        if room >= self.first:
            room, squares = 1, torch.zeros_like(squares)
        while True:
            kept = top(scores, self.first - room)
            away = torch.ones(len(scores), dtype=torch.bool)
            away[kept] = False
            needed = len(set(squares[away].tolist()))
            if needed == room:
                return kept, away.nonzero()[:, 0], squares
            room = needed

    def choose(self, view: LayerView, count: int) -> Tensor:
        """The best that are still there, for every question alike."""
        kept = top(self.left, count)
        self.left = self.left[kept]
        return kept.expand(len(view.lengths), -1)


def vflowopt(
    num_tokens: int,
    num_layers: int,
    rate: float,
    ratios: Sequence[float] = (0.5, 0.5),
    threshold: float = 1.0,
    entropy: float = 1.0,
    recycle: int | None = 6,
) -> Pruning:
    """VFlowOpt at a pruning rate.

    Args:
        ratios: what stays at a third and at two thirds of the language model; none: all.
        threshold: times the mean attention received; only tokens that receive more are asked.
        entropy: its weight.
        recycle: side of a square that what leaves is gathered in; None: it is dropped.
    """
    layers = [round(num_layers * part / 3) for part in (1, 2)][: len(ratios)]
    first, later = stages_from_the_start(num_tokens, rate, num_layers, layers, ratios)
    flow = Flow(first, threshold, entropy, recycle)
    return Pruning(lambda sight: flow.begin(sight.image), later, flow.choose)
