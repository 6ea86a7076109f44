# SPDX-License-Identifier: Apache-2.0
"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467; after the authors' code).

Dominant tokens are those that receive most attention in the vision tower; without a class token that is the
mean over all others. The rest is merged into contextual tokens: targets evenly among them, and every other
token joins the target whose key is most similar. The paper splits 64 tokens 54 to 10.

Deviations: the last attention over the whole image instead of the last but one layer; keys of all heads side
by side instead of their mean; the features are merged after the projector. The authors add the mean of the
others to the target, which doubles its length: that is a configuration, and the mean of the whole group is
what comes first.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Seen, top
from vllm_crop.planning.budget import retained_count

CONTEXTUAL = 10 / 64
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "10 of 64 contextual": {},
    "10 of 64 contextual, added": {"added": True},
    "none contextual": {"contextual": 0.0},
    "5 % contextual": {"contextual": 0.05},
    "10 % contextual": {"contextual": 0.1},
    "25 % contextual": {"contextual": 0.25},
    "25 % contextual, added": {"contextual": 0.25, "added": True},
    "50 % contextual": {"contextual": 0.5},
    "75 % contextual": {"contextual": 0.75},
}


def zip_tokens(image: Seen, count: int, share: float = CONTEXTUAL, added: bool = False) -> Kept:
    """`count` tokens of an image: dominant ones as they are, contextual ones merged."""
    contextual = round(count * share)
    dominant = top(image.received, count - contextual)
    rest = torch.ones(len(image.received), dtype=torch.bool)
    rest[dominant] = False
    others = rest.nonzero()[:, 0]
    if not contextual or not len(others):
        return Kept.choose(image.features, dominant[None])
    targets = others[torch.arange(contextual) * len(others) // contextual]
    merged = _merge(image, others, targets, added)
    tokens = torch.cat([dominant, targets])
    order = tokens.argsort()
    features = torch.cat([image.features[dominant], merged])
    return Kept(features[order][None], tokens[order][None])


def _merge(image: Seen, others: Tensor, targets: Tensor, added: bool) -> Tensor:
    """Features of the groups around the targets: their mean, or the target plus the mean of the others."""
    keys = normalize(image.keys, dim=-1)
    group = (keys[others] @ keys[targets].T).argmax(-1)
    group[torch.searchsorted(others, targets)] = torch.arange(len(targets))  # a target stays with itself
    member = torch.nn.functional.one_hot(group, len(targets)).to(image.features.dtype)
    total, size = member.T @ image.features[others], member.sum(0)[:, None]
    if not added:
        return total / size
    own = image.features[targets]
    return own + (total - own) / (size - 1).clamp(min=1)


def visionzip(
    num_tokens: int, num_layers: int, rate: float, contextual: float = CONTEXTUAL, added: bool = False
) -> Pruning:
    """VisionZip at a pruning rate.

    Args:
        contextual: the share of contextual tokens among the kept.
        added: as in the authors' code, the mean of a group's others is added to its target.
    """
    count = retained_count(num_tokens, rate)
    if count == num_tokens:
        return Pruning()
    return Pruning(lambda sight: zip_tokens(sight.image, count, contextual, added))
