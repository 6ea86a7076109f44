# SPDX-License-Identifier: Apache-2.0
"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417).

Words that are closer to the image than the average word are the raters: by the mean over visual tokens of
softmax(H_v H_q^T). Visual tokens are ranked by the mean attention of the raters. The budget replaces the
rank-based choice of how many leave at a layer; recycling (merging what left into a few tokens) is left out.
Stages are PyramidDrop's.
"""

import torch
from torch import Tensor

from lab.evaluation.rivals.budgets import pyramid
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Sight, top


class Raters:
    """Chooses the raters before the first layer, and asks them at every stage."""

    def __init__(self) -> None:
        self.words: list[Tensor] = []

    def appoint(self, sight: Sight) -> Kept:
        """All visual tokens stay, for now."""
        features = sight.image.features
        self.words = [rated_words(features, words) for words in sight.words]
        return Kept(features[None], torch.arange(len(features))[None])

    def choose(self, view: LayerView, count: int) -> Tensor:
        """By the mean attention of the raters, in the layer before."""
        attention, rows = view.attention(), []
        for question, (chosen, words) in enumerate(zip(self.words, view.words, strict=True)):
            rows.append(attention[question, words.nonzero()[:, 0][chosen]].mean(0))
        return top(torch.stack(rows), count)


def rated_words(features: Tensor, words: Tensor) -> Tensor:
    """Which words `[words, hidden]` are above the average relevance; never none."""
    relevance = (features @ words.T).softmax(dim=-1).mean(0)
    return relevance >= relevance.mean()


def sparsevlm(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """SparseVLM at a pruning rate."""
    raters = Raters()
    return Pruning(raters.appoint, pyramid(num_tokens, rate, num_layers), raters.choose)
