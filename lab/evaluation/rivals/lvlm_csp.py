# SPDX-License-Identifier: Apache-2.0
"""LVLM_CSP (Chen et al., arXiv 2504.10854; after excerpts and a review).

Clustering: the first layers see few tokens, an even grid or those that receive most attention in the vision
tower. Scattering: then some layers see all tokens again. Pruning: from there on only those stay that the last
token attends to most. It was made for segmentation, where the token asked is the one that begins a mask.

Deviations: tokens that were away come back as they were embedded; the token asked is the last one before the
answer. Layers that see everything are dear in a model of twelve: there is one. The last count is solved for
the budget.
"""

from typing import Literal

from lab.evaluation.rivals.even_grid import even_tokens
from lab.evaluation.rivals.fastv import choose
from lab.evaluation.runner.method import Kept, Pruning, Sight, top
from vllm_crop.planning.budget import BudgetError, target_average

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "grid of 36, all at 4": {"first": 36},
    "grid of 36, all at 3": {"first": 36, "layer": 3},
    "grid of 36, all at 7": {"first": 36, "layer": 7},
    "grid of 16, all at 3": {"first": 16, "layer": 3},
    "grid of 16, all at 4": {"first": 16},
    "grid of 16, all at 7": {"first": 16, "layer": 7},
    "grid of 64, all at 3": {"first": 64, "layer": 3},
    "grid of 64, all at 4": {"first": 64},
    "tower's 36, all at 4": {"first": 36, "by": "tower"},
    "tower's 36, all at 3": {"first": 36, "layer": 3, "by": "tower"},
    "tower's 16, all at 3": {"first": 16, "layer": 3, "by": "tower"},
    "tower's 16, all at 7": {"first": 16, "layer": 7, "by": "tower"},
    "tower's 64, all at 3": {"first": 64, "layer": 3, "by": "tower"},
    "grid of 16, all at 1": {"first": 16, "layer": 1},
    "grid of 16, all at 2": {"first": 16, "layer": 2},
    "tower's 16, all at 1": {"first": 16, "layer": 1, "by": "tower"},
}


def lvlm_csp(
    num_tokens: int,
    num_layers: int,
    rate: float,
    first: int = 36,
    layer: int = 4,
    by: Literal["grid", "tower"] = "grid",
) -> Pruning:
    """LVLM_CSP at a pruning rate.

    Args:
        first: tokens of the first layers.
        layer: the one that sees all tokens.
        by: how the first ones are chosen.

    Raises:
        BudgetError: the layers up to and with the one that sees everything take more than the rate leaves.
    """
    total = target_average(num_tokens, rate) * num_layers
    left = round((total - first * layer - num_tokens) / (num_layers - layer - 1))
    if left > num_tokens:  # a low rate: all stay, and more of them are there from the start
        left, first = num_tokens, round((total - num_tokens * (num_layers - layer)) / layer)
    if left < 1:
        raise BudgetError(
            f"{first} tokens in {layer} layers and {num_tokens} in one are more than a pruning rate of "
            f"{rate:g} leaves to all"
        )

    def begin(sight: Sight) -> Kept:
        image = sight.image
        tokens = even_tokens(image.grid, first) if by == "grid" else top(image.received, first)
        return Kept.choose(image.features, tokens[None])

    return Pruning(begin, {layer + 1: left}, choose, rejoin=layer)
