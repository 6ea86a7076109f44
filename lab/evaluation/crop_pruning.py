# SPDX-License-Identifier: Apache-2.0
"""CROP's own plans on the runner: the same TokenPlan the engine serves, computed by plain transformers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lab.evaluation.runner.method import Kept, LayerView, Pruning, Sight
from vllm_crop.planning.plan import TokenPlan


def crop_pruning(plans: Sequence[TokenPlan], num_layers: int) -> Pruning:
    """What plans of equal counts do, one per question."""
    counts = plans[0].tokens_per_layer(num_layers)
    assert all(plan.tokens_per_layer(num_layers) == counts for plan in plans), "plans differ in counts"
    stages = {layer: counts[layer] for layer in range(1, num_layers) if counts[layer] < counts[layer - 1]}

    def before(sight: Sight) -> Kept:
        features = torch.stack([pooled(sight.image.features, plan) for plan in plans])
        tokens = torch.stack([torch.tensor(plan.position).long() for plan in plans])
        return Kept(features, tokens)

    def choose(view: LayerView, count: int) -> Tensor:
        rows = torch.stack([_staying(plan, view.layer) for plan in plans])
        assert rows.shape[1] == count, f"{rows.shape[1]} tokens stay, {count} planned"
        return rows

    unchanged = not any(plan.compresses for plan in plans)
    return Pruning(None if unchanged else before, stages, choose)


def pooled(features: Tensor, plan: TokenPlan) -> Tensor:
    """The mean of the tokens of each embedding, `[num_embeddings, hidden]`."""
    return torch.stack([features[tokens].mean(0) for tokens in plan.members()])


def _staying(plan: TokenPlan, layer: int) -> Tensor:
    """Which of the embeddings present before a layer it still runs with."""
    present = plan.evicted_from_layer[plan.evicted_from_layer >= layer]
    return torch.from_numpy((present > layer).nonzero()[0])
