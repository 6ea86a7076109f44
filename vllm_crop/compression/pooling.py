# SPDX-License-Identifier: Apache-2.0
"""What a plan leaves of an image's features, untrained: means of groups, or single tokens. torch only."""

import torch


def compress(
    features: torch.Tensor, assignment: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Average the features of each planned embedding; embeddings of one token are copied exactly.

    Sums run over sorted segments, so the result does not depend on the order of atomic additions.

    Args:
        features: `[num_tokens, hidden]`, visual tokens in row-major grid order; others if `rows` says where.
        assignment: `[num_tokens]`, on the CPU; embedding index of each token, -1 for tokens left out
            (`TokenPlan.assignment`). Every index from 0 to the largest occurs.
        rows: `[num_tokens]`, on the CPU; which of `features` are those of each token.

    Returns:
        `[num_embeddings, hidden]` in the dtype of `features`; means are taken in float32.
    """
    order = torch.argsort(assignment, stable=True)
    order = order[(assignment < 0).sum() :]
    lengths = torch.bincount(assignment[order].long())
    picked = order if rows is None else rows[order]
    selected = features[picked.to(features.device)]
    if len(lengths) == len(order):
        return selected
    # Checking the lengths, which the CPU has just counted, would wait for all that the device has yet to do.
    means = torch.segment_reduce(
        selected.float(), "mean", lengths=lengths.to(features.device, non_blocking=True), unsafe=True
    )
    return means.to(features.dtype)
