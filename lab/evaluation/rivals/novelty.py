# SPDX-License-Identifier: Apache-2.0
"""Neighbour novelty: our own baseline, of no paper. Tokens that differ from their neighbours stay.

A token is compared with its left and its upper neighbour, and the least similar ones are kept. The idea is
taken from efficient video sampling (arXiv 2510.14624), which compares a frame with the one before and would
keep all of a single image: a score here says nothing about that method.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Seen, top
from vllm_crop.planning.budget import retained_count


def scores(image: Seen) -> Tensor:
    """`[tokens]` mean of one minus the cosine with the neighbours; the first token has none and is new."""
    rows, cols = image.grid.rows, image.grid.cols
    field = normalize(image.features, dim=-1).view(rows, cols, -1)
    total, seen = torch.zeros(rows, cols), torch.zeros(rows, cols)
    total[:, 1:] += 1 - (field[:, 1:] * field[:, :-1]).sum(-1)
    seen[:, 1:] += 1
    total[1:] += 1 - (field[1:] * field[:-1]).sum(-1)
    seen[1:] += 1
    total[0, 0], seen[0, 0] = 2.0, 1.0
    return (total / seen).flatten()


def novelty(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """Keep the newest tokens at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: Kept.choose(sight.image.features, top(scores(sight.image), count)[None]))
