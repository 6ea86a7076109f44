# SPDX-License-Identifier: Apache-2.0
"""Random: a control, of no paper. Tokens drawn evenly, by the picture: the same ones in every run."""

import torch
from torch import Tensor

from lab.evaluation.runner.method import Kept, Pruning, Seen
from vllm_crop.planning.budget import retained_count


def drawn(image: Seen, count: int) -> Tensor:
    """`count` indices; a smaller count gives the first of them."""
    dice = torch.Generator().manual_seed(image.fingerprint)
    return torch.randperm(image.grid.num_tokens, generator=dice)[:count]


def random(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """Keep tokens by chance at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: Kept.choose(sight.image.features, drawn(sight.image, count)[None]))
