# SPDX-License-Identifier: Apache-2.0
"""Stride: a control, of no paper. Tokens on a grid that is as even as it can be with exactly the count.

What it keeps depends on nothing but the size of the image. At a ninth of a square of 24 that is the middle of
every field of three by three.
"""

import math

import torch
from torch import Tensor

from lab.evaluation.runner.method import Kept, Pruning
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import TokenGrid


def even_tokens(grid: TokenGrid, count: int) -> Tensor:
    """`count` ascending indices: rows at even distances, and in each row columns at even distances."""
    most, least = grid.rows, math.ceil(count / grid.cols)
    rows = min(most, max(least, round(math.sqrt(count * grid.rows / grid.cols))))
    chosen = []
    for index in range(rows):
        columns = (index + 1) * count // rows - index * count // rows
        row = (2 * index + 1) * grid.rows // (2 * rows)
        chosen += [row * grid.cols + (2 * col + 1) * grid.cols // (2 * columns) for col in range(columns)]
    return torch.tensor(chosen)


def stride(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """Keep an even grid at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(
        lambda sight: Kept.choose(sight.image.features, even_tokens(sight.image.grid, count)[None])
    )
