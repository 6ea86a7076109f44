# SPDX-License-Identifier: Apache-2.0
"""Training-free compression: the embeddings of a TokenPlan from an image's visual features (torch only)."""

import torch


def compress(features: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Average the features of each planned embedding; embeddings of one token are copied exactly.

    Sums run over sorted segments, so the result does not depend on the order of atomic additions.

    Args:
        features: `[num_tokens, hidden]`, visual tokens in row-major grid order.
        assignment: `[num_tokens]`, on the CPU; embedding index of each token, -1 for tokens left out
            (`TokenPlan.assignment`). Every index from 0 to the largest occurs.

    Returns:
        `[num_embeddings, hidden]` in the dtype of `features`; means are taken in float32.
    """
    order = torch.argsort(assignment, stable=True)
    order = order[(assignment < 0).sum() :]
    lengths = torch.bincount(assignment[order].long())
    selected = features[order.to(features.device)]
    if len(lengths) == len(order):
        return selected
    return torch.segment_reduce(selected.float(), "mean", lengths=lengths.to(features.device)).to(
        features.dtype
    )
