# SPDX-License-Identifier: Apache-2.0
"""VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803).

All visual tokens leave at one layer. So only multiples of one layer can be met: the nearest to the budget is
taken, at least one layer, and the tokens it really took are reported.
"""

import torch
from torch import Tensor

from lab.evaluation.runner.method import LayerView, Pruning
from vllm_crop.planning.budget import target_average


def choose(view: LayerView, count: int) -> Tensor:
    """None is left."""
    return torch.empty(len(view.lengths), count, dtype=torch.long)


def vtw(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """VTW at a pruning rate."""
    layer = max(1, round(num_layers * target_average(num_tokens, rate) / num_tokens))
    return Pruning(stages={layer: 0} if layer < num_layers else {}, choose=choose)
