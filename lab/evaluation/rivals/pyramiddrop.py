# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247; after the authors' code).

At the end of each of three stages the visual tokens are ranked by the attention of the instruction's last
token, computed with the projections of the layer to come, and a fixed fraction stays. The paper's stages end
at the quarters of the model, and half of the tokens stay each time.

Deviations: half each time leaves 47 % of the tokens on average, which is no rate of ours: the first count is
solved for the budget and the ratio holds between the following ones. Tokens keep their positions, where the
authors number them anew. Stages may begin earlier than at a quarter, where the budget asks for it.
"""

from torch import Tensor

from lab.evaluation.rivals.budgets import scaled, stages, thirds
from lab.evaluation.runner.method import LayerView, Pruning, top

CONFIGURATIONS: dict[str, dict[str, float | int | None]] = {
    "quarters, ratio 0.5": {"first": 3},
    "from 2, ratio 0.5": {"first": 2},
    "from 1, ratio 0.5": {"first": 1},
    "quarters, one ratio throughout": {"first": 3, "ratio": None},
    "from 2, one ratio throughout": {"first": 2, "ratio": None},
    "from 1, one ratio throughout": {"first": 1, "ratio": None},
    "from 1, ratio 0.25": {"first": 1, "ratio": 0.25},
    "from 2, ratio 0.25": {"first": 2, "ratio": 0.25},
    "1 and 4, ratio 0.125": {"first": 1, "second": 4, "ratio": 0.125},
    "1 and 8, ratio 0.5": {"first": 1, "second": 8, "ratio": 0.5},
}


def choose(view: LayerView, count: int) -> Tensor:
    """By the attention that the last word is about to pay."""
    return top(view.next_view().last_word_attention(), count)


def pyramiddrop(
    num_tokens: int,
    num_layers: int,
    rate: float,
    first: int = 3,
    ratio: float | None = 0.5,
    second: int | None = None,
) -> Pruning:
    """PyramidDrop at a pruning rate.

    Args:
        first: the layer at which the first tokens leave.
        ratio: of each stage to the one before, the first ones apart; None: of all, the full image included.
        second: the layer at which the last ones leave; None: two more stages at even distances.
    """
    layers = thirds(num_layers, first) if second is None else (first, second)
    if ratio is None:
        left = stages(num_tokens, rate, num_layers, layers)
    else:
        proportions = [ratio**stage for stage in range(len(layers))]
        left = scaled(num_tokens, rate, num_layers, layers, proportions)
    return Pruning(stages=left, choose=choose)
