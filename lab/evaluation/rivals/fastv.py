# SPDX-License-Identifier: Apache-2.0
"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764, section 4.1).

After layer K the visual tokens with the lowest attention score of that layer leave, the score being the mean
over heads: here, as in the authors' code, of the attention of the last token. The paper's K is 2; where the
budget is smaller than two full layers, K is 1.
"""

from torch import Tensor

from lab.evaluation.rivals.budgets import one_shot
from lab.evaluation.runner.method import LayerView, Pruning, top

LAYER = 2


def choose(view: LayerView, count: int) -> Tensor:
    """By the attention that the last word has paid in the layer before."""
    return top(view.last_word_attention(), count)


def fastv(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """FastV at a pruning rate."""
    return Pruning(stages=one_shot(num_tokens, rate, num_layers, LAYER), choose=choose)
