# SPDX-License-Identifier: Apache-2.0
"""VisPruner (Zhang et al., arXiv 2412.01818; after the authors' code).

Half of the tokens are those that receive most attention in the vision tower. Of the rest, in that order,
eight leave at a time: every other one is compared with those between, and those leave whose most similar
partner is most similar. What is left when the count is met stays, too.

Deviations: without a class token, attention is the mean over all queries; features are those before the
merger of four patches, side by side.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Seen
from vllm_crop.planning.budget import retained_count

AT_ONCE = 8
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "half important": {},
    "10 % important": {"important": 0.1},
    "25 % important": {"important": 0.25},
    "75 % important": {"important": 0.75},
    "90 % important": {"important": 0.9},
    "half important, features of the model": {"tower": False},
    "25 % important, features of the model": {"important": 0.25, "tower": False},
}


def prune(received: Tensor, features: Tensor, count: int, important: float) -> Tensor:
    """`count` indices of `[tokens, width]`."""
    order = received.argsort(descending=True, stable=True)
    first = int(count * important)
    kept, rest = order[:first], order[first:]
    directions = normalize(features, dim=-1)
    while (leave := min(AT_ONCE, len(rest) - (count - first))) > 0:
        even, odd = rest[::2], rest[1::2]
        leave = min(leave, len(even))
        nearest = (directions[even] @ directions[odd].T).max(-1).values
        rest = torch.cat([even[nearest.argsort(descending=True, stable=True)[leave:]], odd])
    return torch.cat([kept, rest])


def vispruner(
    num_tokens: int, num_layers: int, rate: float, important: float = 0.5, tower: bool = True
) -> Pruning:
    """VisPruner at a pruning rate.

    Args:
        important: the share kept by attention.
        tower: tokens are compared as the tower has seen them; else as the language model receives them.
    """
    count = retained_count(num_tokens, rate)

    def choose(image: Seen) -> Kept:
        features = image.tower if tower else image.features
        return Kept.choose(image.features, prune(image.received, features, count, important)[None])

    return Pruning(lambda sight: choose(sight.image))
