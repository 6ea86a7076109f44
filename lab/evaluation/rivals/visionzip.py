# SPDX-License-Identifier: Apache-2.0
"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467).

Dominant tokens are those that receive most attention in the vision tower; without a class token that is the
mean over all others. The rest is merged into contextual tokens: targets evenly among them, every other token
joins the target whose key is most similar, and each group is averaged. The paper splits 64 tokens 54 to 10.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Seen, top
from vllm_crop.planning.budget import retained_count

CONTEXTUAL = 10 / 64


def zip_tokens(image: Seen, count: int) -> Kept:
    """`count` tokens of an image: dominant ones as they are, contextual ones merged."""
    contextual = round(count * CONTEXTUAL)
    dominant = top(image.received, count - contextual)
    rest = torch.ones(len(image.received), dtype=torch.bool)
    rest[dominant] = False
    others = rest.nonzero()[:, 0]
    if not contextual or not len(others):
        return Kept.choose(image.features, dominant[None])
    targets = others[torch.arange(contextual) * len(others) // contextual]
    merged = _merge(image, others, targets)
    tokens = torch.cat([dominant, targets])
    order = tokens.argsort()
    features = torch.cat([image.features[dominant], merged])
    return Kept(features[order][None], tokens[order][None])


def _merge(image: Seen, others: Tensor, targets: Tensor) -> Tensor:
    """Mean features of the groups around the targets."""
    keys = normalize(image.keys, dim=-1)
    group = (keys[others] @ keys[targets].T).argmax(-1)
    group[torch.searchsorted(others, targets)] = torch.arange(len(targets))  # a target stays with itself
    member = torch.nn.functional.one_hot(group, len(targets)).to(image.features.dtype)
    return member.T @ image.features[others] / member.sum(0)[:, None]


def visionzip(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """VisionZip at a pruning rate."""
    count = retained_count(num_tokens, rate)
    if count == num_tokens:
        return Pruning()
    return Pruning(lambda sight: zip_tokens(sight.image, count))
