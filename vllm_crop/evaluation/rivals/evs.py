# SPDX-License-Identifier: Apache-2.0
"""EVS-style similarity (efficient video sampling, arXiv 2510.14624, as vLLM ships it for videos).

EVS drops tokens that resemble the token at the same place one frame before. A single image has no frame
before; here a token is compared with its left and upper neighbours, and the least similar ones stay.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vllm_crop.budget import retained_count
from vllm_crop.evaluation.runner.seam import Kept, Pruning, Seen, top


def novelty(image: Seen) -> Tensor:
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


def evs(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """EVS-style pruning at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: Kept.choose(sight.image.features, top(novelty(sight.image), count)[None]))
