# SPDX-License-Identifier: Apache-2.0
"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764, section 4.1; after the authors' code).

After layer K the visual tokens with the lowest attention score of that layer leave, the score being the mean
over heads of the attention of the last token. The paper's K is 2 of 32 layers.

Deviations: the budget is an average over layers, so K decides how many tokens are left and can be too late
for a rate; K is counted in layers and not as a share of the depth.
"""

from torch import Tensor

from lab.evaluation.rivals.budgets import stages
from lab.evaluation.runner.method import LayerView, Pruning, top

CONFIGURATIONS = {f"K={layer}": {"layer": layer} for layer in (2, 1, 3, 4, 8)}


def choose(view: LayerView, count: int) -> Tensor:
    """By the attention that the last word has paid in the layer before."""
    return top(view.last_word_attention(), count)


def fastv(num_tokens: int, num_layers: int, rate: float, layer: int = 2) -> Pruning:
    """FastV at a pruning rate, after `layer` layers."""
    return Pruning(stages=stages(num_tokens, rate, num_layers, (layer,)), choose=choose)
