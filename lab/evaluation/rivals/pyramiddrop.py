# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247; after the authors' code).

At the end of each of three stages the visual tokens are ranked by the attention of the instruction's last
token, computed with the projections of the layer to come, and a fixed fraction stays. The paper's stages end
at the quarters of the model, and half of the tokens stay each time.

Deviations: half each time leaves 47 % of the tokens on average, which is no rate of ours: the first count is
solved for the budget and the ratio holds between the following ones. Tokens keep their positions, where the
authors number them anew. Stages may begin earlier than at a quarter, where the budget asks for it.
"""

from collections.abc import Sequence

from torch import Tensor

from lab.evaluation.rivals.budgets import scaled, stages
from lab.evaluation.runner.method import LayerView, Pruning, top

QUARTERS = (3, 6, 9)  # of twelve layers
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "quarters, ratio 0.5": {},
    "2, 5, 9, ratio 0.5": {"layers": [2, 5, 9]},
    "1, 5, 8, ratio 0.5": {"layers": [1, 5, 8]},
    "quarters, one ratio throughout": {"ratio": None},
    "2, 5, 9, one ratio throughout": {"layers": [2, 5, 9], "ratio": None},
    "1, 5, 8, one ratio throughout": {"layers": [1, 5, 8], "ratio": None},
    "2, 5, 9, ratio 0.25": {"layers": [2, 5, 9], "ratio": 0.25},
    "1, 5, 8, ratio 0.25": {"layers": [1, 5, 8], "ratio": 0.25},
    "1, 3, 7, ratio 0.5": {"layers": [1, 3, 7]},
    "1, 3, 7, ratio 0.25": {"layers": [1, 3, 7], "ratio": 0.25},
    "1, 4, ratio 0.125": {"layers": [1, 4], "ratio": 0.125},
    "1, 3, ratio 0.125": {"layers": [1, 3], "ratio": 0.125},
    "1, 7, ratio 0.125": {"layers": [1, 7], "ratio": 0.125},
    "1, 7, ratio 0.5": {"layers": [1, 7]},
    "3, 7, ratio 0.25": {"layers": [3, 7], "ratio": 0.25},
}


def choose(view: LayerView, count: int) -> Tensor:
    """By the attention that the last word is about to pay."""
    return top(view.next_view().last_word_attention(), count)


def pyramiddrop(
    num_tokens: int,
    num_layers: int,
    rate: float,
    layers: Sequence[int] = QUARTERS,
    ratio: float | None = 0.5,
) -> Pruning:
    """PyramidDrop at a pruning rate.

    Args:
        layers: at which tokens leave.
        ratio: of each stage to the one before, the first ones apart; None: of all, the full image included.
    """
    if ratio is None:
        left = stages(num_tokens, rate, num_layers, tuple(layers))
    else:
        proportions = [ratio**stage for stage in range(len(layers))]
        left = scaled(num_tokens, rate, num_layers, tuple(layers), proportions)
    return Pruning(stages=left, choose=choose)
