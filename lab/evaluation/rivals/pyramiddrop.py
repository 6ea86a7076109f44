# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247).

At the end of each stage the visual tokens are ranked by the attention of the instruction's last token,
computed with the projections of the layer to come, and a fixed fraction stays. Stages end at the quarters of
the model; where the budget asks for it, earlier.
"""

from torch import Tensor

from lab.evaluation.rivals.budgets import pyramid
from lab.evaluation.runner.method import LayerView, Pruning, top


def choose(view: LayerView, count: int) -> Tensor:
    """By the attention that the last word is about to pay."""
    return top(view.next_view().last_word_attention(), count)


def pyramiddrop(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """PyramidDrop at a pruning rate."""
    return Pruning(stages=pyramid(num_tokens, rate, num_layers), choose=choose)
