# SPDX-License-Identifier: Apache-2.0
"""PTP, pyramid token pruning (Liang et al., arXiv 2509.15704; after excerpts and a review).

Regions get their parts of the count first: by the softmax, at a temperature, of how like the whole picture a
region is. Within a region tokens stay by `alpha` times the attention they receive in the vision tower plus
the rest times the attention that the instruction pays them in a layer of the language model, both normalised.

Deviations: the regions are fields of eight by eight tokens of one picture, where the authors have tiles of a
high-resolution one; a region is compared with the picture by their mean embeddings; normalised is to a sum of
one within the region. What a region cannot hold goes to the next best. With `alpha` of 1 no layer is asked,
and tokens leave before the language model.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lab.evaluation.rivals.budgets import stages
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Seen, Sight, squares_of, top
from vllm_crop.planning.budget import retained_count

REGION = 8  # tokens of a side
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "after layer 2, half by instruction": {},
    "after layer 1, half by instruction": {"layer": 1},
    "after layer 1, half by instruction, 0.3": {"layer": 1, "temperature": 0.3},
    "after layer 1, mostly by instruction": {"layer": 1, "alpha": 0.25},
    "after layer 1, mostly by the tower": {"layer": 1, "alpha": 0.75},
    "after layer 1, by instruction": {"layer": 1, "alpha": 0.0},
    "after layer 1, by instruction, even regions": {"layer": 1, "alpha": 0.0, "temperature": 100.0},
    "after layer 2, mostly by instruction": {"alpha": 0.25},
    "after layer 3, half by instruction": {"layer": 3},
    "after layer 3, by instruction": {"layer": 3, "alpha": 0.0},
    "after layer 4, half by instruction": {"layer": 4},
    "by the tower": {"alpha": 1.0},
    "by the tower, 0.1": {"alpha": 1.0, "temperature": 0.1},
    "by the tower, 0.3": {"alpha": 1.0, "temperature": 0.3},
    "by the tower, 0.6": {"alpha": 1.0, "temperature": 0.6},
    "by the tower, 3": {"alpha": 1.0, "temperature": 3.0},
    "by the tower, even regions": {"alpha": 1.0, "temperature": 100.0},
}


def parts_of(image: Seen, temperature: float, count: int) -> tuple[Tensor, Tensor]:
    """Each token's region, and how many tokens of each region stay."""
    region = squares_of(image.grid, REGION)
    member = torch.nn.functional.one_hot(region).to(image.features.dtype)
    sizes = member.sum(0)
    means = member.T @ image.features / sizes[:, None]
    like = cosine_similarity(means, image.features.mean(0)[None], dim=-1)
    weights = (like / temperature).softmax(0)
    left = torch.zeros(len(sizes), dtype=torch.long)
    # One token after the other to the region that is furthest behind its part and has one left.
    for _ in range(count):
        behind = weights * count - left
        behind[left >= sizes] = float("-inf")
        left[behind.argmax()] += 1
    return region, left


def pick(scores: Tensor, region: Tensor, left: Tensor) -> Tensor:
    """Ascending indices: of each region as many of the best as it has left."""
    chosen = [
        members[top(scores[members], int(count))]
        for one, count in enumerate(left)
        for members in [(region == one).nonzero()[:, 0]]
    ]
    return torch.cat(chosen).sort().values


class Pyramid:
    """Looks at the picture before the language model, and at the instruction after some of its layers."""

    def __init__(self, alpha: float, temperature: float) -> None:
        self.alpha, self.temperature = alpha, temperature
        self.image: Seen | None = None

    def look(self, sight: Sight) -> Kept:
        """All stay, for now."""
        self.image = sight.image
        return Kept(sight.image.features[None], torch.arange(len(sight.image.features))[None])

    def now(self, sight: Sight, count: int) -> Kept:
        """What stays by the tower alone."""
        region, left = parts_of(sight.image, self.temperature, count)
        return Kept.choose(sight.image.features, pick(sight.image.received, region, left)[None])

    def choose(self, view: LayerView, count: int) -> Tensor:
        """By both."""
        assert self.image is not None, "asked before it has looked"
        region, left = parts_of(self.image, self.temperature, count)
        shown = _shares(self.image.received, region)
        rows = []
        for attention, length in zip(view.attention(), view.lengths, strict=True):
            told = _shares(attention[:length].mean(0), region)
            rows.append(pick(self.alpha * shown + (1 - self.alpha) * told, region, left))
        return torch.stack(rows)


def _shares(scores: Tensor, region: Tensor) -> Tensor:
    """Scores as shares of their region's."""
    sums = torch.zeros(int(region.max()) + 1).index_add(0, region, scores)
    return scores / sums[region].clamp(min=1e-12)


def ptp(
    num_tokens: int,
    num_layers: int,
    rate: float,
    layer: int = 2,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Pruning:
    """PTP at a pruning rate.

    Args:
        layer: after how many layers tokens leave; of no account with an `alpha` of 1.
        alpha: share of the tower's word.
        temperature: of how regions share the count.
    """
    pyramid = Pyramid(alpha, temperature)
    if alpha == 1:
        count = retained_count(num_tokens, rate)
        return Pruning(lambda sight: pyramid.now(sight, count))
    return Pruning(pyramid.look, stages(num_tokens, rate, num_layers, (layer,)), pyramid.choose)
