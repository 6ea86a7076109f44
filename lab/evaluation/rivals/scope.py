# SPDX-License-Identifier: Apache-2.0
"""SCOPE (Deng et al., arXiv 2510.24214; after the authors' code).

Tokens are chosen one by one: the next is the one with the largest product of saliency to the power alpha and
gain in coverage. A token is covered by the largest cosine with a chosen one, and a gain is the sum over all
tokens of how much better they would be covered.

Deviations: without a class token, saliency is the attention received from all queries; features are those
before the merger of four patches, side by side. The authors' alpha is set by hand and 1 if it is not.
"""

from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.rivals import mmtok
from lab.evaluation.runner.method import Kept, Pruning, Seen
from vllm_crop.planning.budget import retained_count

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "alpha 1": {},
    "alpha 0": {"alpha": 0.0},
    "alpha 0.25": {"alpha": 0.25},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 1.5": {"alpha": 1.5},
    "alpha 2": {"alpha": 2.0},
    "alpha 0.5, features of the model": {"alpha": 0.5, "tower": False},
    "alpha 1, features of the model": {"tower": False},
}


def covering(features: Tensor, saliency: Tensor, count: int, alpha: float) -> Tensor:
    """Indices of `count` of `[tokens, width]`, in the order chosen."""
    directions = normalize(features, dim=-1)
    return mmtok.covering(directions @ directions.T, count, saliency**alpha)


def scope(num_tokens: int, num_layers: int, rate: float, alpha: float = 1.0, tower: bool = True) -> Pruning:
    """SCOPE at a pruning rate.

    Args:
        tower: tokens are compared as the tower has seen them; else as the language model receives them.
    """
    count = retained_count(num_tokens, rate)

    def choose(image: Seen) -> Kept:
        features = image.tower if tower else image.features
        return Kept.choose(image.features, covering(features, image.received, count, alpha)[None])

    return Pruning(lambda sight: choose(sight.image))
