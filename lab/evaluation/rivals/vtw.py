# SPDX-License-Identifier: Apache-2.0
"""VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803; after the authors' code).

All visual tokens leave at one layer K: the smallest whose predictions hardly differ from those of the full
model, by the mean Kullback-Leibler divergence on questions of a calibration set. So K belongs to the model
and not to a rate: the tuning finds it on the dev split, and rates that K cannot meet are impossible.

Deviations: every layer is a candidate, where the authors begin with the fifth of 32. The threshold of 0.003
is from memory of the paper and was not verified. Without a calibration K is half of the depth, as the authors
found for LLaVA-1.5-7B.
"""

import torch
from torch import Tensor

from lab.evaluation.runner.method import LayerView, Pruning
from vllm_crop.planning.budget import BudgetError, target_average

THRESHOLD = 0.003  # nats
CONFIGURATIONS: dict[str, dict[str, int]] = {
    "half of the depth": {},
    **{f"K={layer}": {"layer": layer} for layer in range(1, 32)},
}


def named(layer: int) -> str:
    """The configuration that withdraws at a layer."""
    return f"K={layer}"


def choose(view: LayerView, count: int) -> Tensor:
    """None is left."""
    return torch.empty(len(view.lengths), count, dtype=torch.long)


def withdrawal(layer: int) -> Pruning:
    """All visual tokens leave at a layer."""
    return Pruning(stages={layer: 0}, choose=choose)


def divergence(full: Tensor, withdrawn: Tensor) -> float:
    """Of two predictions, as logarithms of probabilities `[vocabulary]`; in nats."""
    return float((full.exp() * (full - withdrawn)).sum())


def smallest_below(divergences: dict[int, float], threshold: float = THRESHOLD) -> int | None:
    """The paper's K; None if none is below the threshold."""
    return min((layer for layer, mean in divergences.items() if mean < threshold), default=None)


def vtw(num_tokens: int, num_layers: int, rate: float, layer: int | None = None) -> Pruning:
    """VTW at a pruning rate that its layer can meet.

    Raises:
        BudgetError: the layers with visual tokens take more than the rate leaves.
    """
    layer = num_layers // 2 if layer is None else layer
    if layer >= num_layers:
        raise BudgetError(f"the model has {num_layers} layers, so none is left behind layer {layer}")
    if layer * num_tokens > (target_average(num_tokens, rate) + 0.5) * num_layers:
        raise BudgetError(
            f"tokens are withdrawn at layer {layer} of {num_layers}, which is a pruning_rate of at most "
            f"{1 - layer / num_layers:.3g}"
        )
    return Pruning() if rate == 0 else withdrawal(layer)
