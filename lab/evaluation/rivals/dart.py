# SPDX-License-Identifier: Apache-2.0
"""DART (Wen et al., arXiv 2502.11494; after a review of the authors' code).

Behind layer K (2 of 32) the tokens with the largest keys are pivots: four of the image and four of the text,
by the sum of absolute values over all heads. Each pivot in turn brings in the tokens of the image that are
least like it, by the cosine of normalised states, and takes them out of the pool. Pivots of the image and
what all pivots brought in stay.

Deviations: every pivot brings an eighth of the count there, in whole numbers, so that image pivots come on
top: here all pivots together bring what is left of the count. Text is what stands behind the image. K is too
late for some budgets. Before the first layer there are no keys: pivots are the image's largest features.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.rivals.budgets import stages
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Seen, top
from vllm_crop.planning.budget import retained_count

PIVOTS = 4
CONFIGURATIONS: dict[str, dict[str, int]] = {
    "K=2": {},
    "K=1": {"layer": 1},
    "K=3": {"layer": 3},
    "K=4": {"layer": 4},
    "before the first layer": {"layer": 0},
    "K=2, 1 pivot each": {"pivots": 1},
    "K=2, 8 pivots each": {"pivots": 8},
    "K=1, 1 pivot each": {"layer": 1, "pivots": 1},
    "K=1, 8 pivots each": {"layer": 1, "pivots": 8},
    "before, 1 pivot": {"layer": 0, "pivots": 1},
    "before, 8 pivots": {"layer": 0, "pivots": 8},
    "before, 16 pivots": {"layer": 0, "pivots": 16},
}


def unlike(image: Tensor, pivots: Tensor, text: Tensor, count: int) -> Tensor:
    """`count` indices of states `[tokens, width]`: pivots of the image, and what all pivots bring.

    Args:
        pivots: indices.
        text: states of pivots of the text `[pivots, width]`.
    """
    directions = normalize(image, dim=-1)
    asking = torch.cat([directions[pivots], normalize(text, dim=-1)])
    chosen, free = pivots[:count].tolist(), torch.ones(len(image), dtype=torch.bool)
    free[chosen] = False
    for index, pivot in enumerate(asking):
        brings = (count - len(chosen)) // (len(asking) - index)
        close = (directions @ pivot).masked_fill(~free, float("inf"))
        brought = top(-close, brings)
        free[brought] = False
        chosen += brought.tolist()
    return torch.tensor(chosen)


def choose(view: LayerView, count: int, pivots: int) -> Tensor:
    """By the keys and states of the layer before."""
    questions = len(view.lengths)
    keys = view.image.keys.expand(questions, -1, -1, -1)
    states = view.norm(view.image_rows.hidden).expand(questions, -1, -1)
    said, rows = view.norm(view.text_rows.hidden), []
    for index, length in enumerate(view.lengths):
        of_text = said[index][largest(view.text.keys[index][:, : int(length)], pivots)]
        rows.append(unlike(states[index], largest(keys[index], pivots), of_text, count))
    return torch.stack(rows).sort(dim=-1).values


def largest(keys: Tensor, count: int) -> Tensor:
    """Indices of the tokens with the largest keys `[heads, tokens, width]`."""
    return top(keys.abs().sum((0, 2)), count)


def before(image: Seen, count: int, pivots: int) -> Kept:
    """By features alone."""
    chosen = top(image.features.abs().sum(-1), pivots)
    return Kept.choose(image.features, unlike(image.features, chosen, image.features[:0], count)[None])


def dart(num_tokens: int, num_layers: int, rate: float, layer: int = 2, pivots: int = PIVOTS) -> Pruning:
    """DART at a pruning rate.

    Args:
        layer: at which tokens leave; 0: before the first.
        pivots: of the image, and as many of the text.
    """
    if layer:
        left = stages(num_tokens, rate, num_layers, (layer,))
        return Pruning(stages=left, choose=lambda view, count: choose(view, count, pivots))
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: before(sight.image, count, pivots))
