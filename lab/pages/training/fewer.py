# SPDX-License-Identifier: Apache-2.0
"""Pictures with fewer visual tokens, as any method could leave them; nothing here knows the question."""

import random

import torch
from torch import Tensor

from lab.tinyvqa.training.forward import PREFIX, Layout, keep_tokens


def fewer_tokens(
    features: Tensor, layout: Layout, rows: int, cols: int, chance: random.Random
) -> tuple[Tensor, Layout]:
    """Keep a random part, or the means of squares.

    Args:
        features: `[batch, rows * cols, hidden]`.
    """
    if chance.random() < 0.5:
        return _random_part(features, layout, chance)
    return _squares(features, layout, rows, cols, chance.choice((2, 3)))


def _random_part(features: Tensor, layout: Layout, chance: random.Random) -> tuple[Tensor, Layout]:
    batch, tokens, hidden = features.shape
    left = max(8, round(tokens * chance.uniform(0.1, 0.9)))
    order = torch.rand(batch, tokens, device=features.device).argsort(dim=1)[:, :left].sort(dim=1).values
    return features.gather(1, order[..., None].expand(-1, -1, hidden)), keep_tokens(layout, order)


def _squares(features: Tensor, layout: Layout, rows: int, cols: int, side: int) -> tuple[Tensor, Layout]:
    """Means of squares of tokens, each at the place of its middle token."""
    batch, _, hidden = features.shape
    index = torch.arange(rows * cols, device=features.device).view(rows, cols)
    across = -(-cols // side)
    group = (index // cols // side) * across + index % cols // side
    groups = across * -(-rows // side)
    sums = features.new_zeros(batch, groups, hidden).index_add(1, group.flatten(), features)
    counts = torch.bincount(group.flatten(), minlength=groups)
    first = torch.arange(groups, device=features.device)
    row = (first // across * side + side // 2).clamp(max=rows - 1)
    col = (first % across * side + side // 2).clamp(max=cols - 1)
    kept = (row * cols + col).expand(batch, -1)
    assert layout.image == PREFIX + rows * cols
    return sums / counts[:, None], keep_tokens(layout, kept)
