# SPDX-License-Identifier: Apache-2.0
"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417; after the authors' code).

Text that is closer to the image than the average of it are the raters: by the mean over visual tokens of
softmax(H_v H_q^T) over the text, all that stands behind the image being text. Visual tokens are ranked by the
mean attention of the raters, in layers 2, 6 and 15 of 32, whose output is pruned. The authors' counts for
192, 128 and 64 tokens are kept in proportion and scaled to the budget.

Version 2 (in their repository) merges nothing, averages the half of the heads that attends most from text to
image, and divides attention by what the rotation alone would give it. We know of it from a review of that
code: that its weight is a softmax over the image of queries and keys of ones is our reading.

Deviations: no recycling (version 1 merges some of what leaves into a few tokens and numbers positions anew);
scaled counts in place of ranks of matrices; stages as shares of the depth. Raters presume embeddings of words
and images that are aligned, which tinyvqa's are not.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lab.evaluation.rivals.budgets import scaled
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Rows, Sight, top

AUTHORS_COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "counts as for 64": {"counts": 64},
    "counts as for 128": {"counts": 128},
    "counts as for 192": {"counts": 192},
    "layer to come, as for 64": {"counts": 64, "layer": "to come"},
    "layer to come, as for 128": {"counts": 128, "layer": "to come"},
    "layer to come, as for 192": {"counts": 192, "layer": "to come"},
    "words of the question only": {"counts": 64, "raters": "words"},
    "half of the heads": {"counts": 64, "half": True},
    "half of the heads, layer to come": {"counts": 64, "half": True, "layer": "to come"},
    "half of the heads, without rotation": {"counts": 64, "half": True, "level": True},
    "without rotation, layer to come": {"counts": 64, "half": True, "level": True, "layer": "to come"},
    "at 1, 3, 7, layer to come, as for 64": {"counts": 64, "layers": [1, 3, 7], "layer": "to come"},
    "at 1, 3, 7, layer to come, as for 192": {"counts": 192, "layers": [1, 3, 7], "layer": "to come"},
    "at 1, 4, 8, as for 64": {"counts": 64, "layers": [1, 4, 8]},
    "at 2, 4, 8, as for 192": {"counts": 192, "layers": [2, 4, 8]},
}


class Raters:
    """Chooses the raters before the first layer, and asks them at every stage."""

    def __init__(
        self,
        raters: Literal["text", "words"] = "text",
        layer: Literal["before", "to come"] = "before",
        half: bool = False,
        level: bool = False,
    ) -> None:
        """Set up.

        Args:
            raters: from all text behind the image, or from the words of the question only.
            layer: whose attention ranks.
            half: only the half of the heads counts that attends most to the image.
            level: attention is divided by that of the rotation alone.
        """
        self.among, self.layer, self.half, self.level = raters, layer, half, level
        self.chosen: list[Tensor] = []

    def appoint(self, sight: Sight) -> Kept:
        """All visual tokens stay, for now."""
        features = sight.image.features
        texts = sight.texts if self.among == "text" else sight.words
        self.chosen = [closer_than_average(features, text) for text in texts]
        return Kept(features[None], torch.arange(len(features))[None])

    def choose(self, view: LayerView, count: int) -> Tensor:
        """By the mean attention of the raters."""
        view = view if self.layer == "before" else view.next_view()
        attention, rows = view.attention_by_head(), []
        if self.level:
            attention = attention / rotation_alone(view.text_rows, view.image_rows)[:, None]
        for question, chosen in enumerate(self.chosen):
            raters = torch.arange(len(chosen))
            if self.among == "words":
                raters = view.words[question].nonzero()[:, 0]
            rated = attention[question][:, raters[chosen]]
            if self.half:
                rated = rated[top(rated.sum((1, 2)), max(1, len(rated) // 2))]
            rows.append(rated.mean((0, 1)))
        return top(torch.stack(rows), count)


def closer_than_average(features: Tensor, text: Tensor) -> Tensor:
    """Which of `[length, hidden]` are closer to the image than the average; all, where none is."""
    relevance = (features @ text.T).softmax(dim=-1).mean(0)
    closer = relevance > relevance.mean()
    return closer if closer.any() else torch.ones_like(closer)


def rotation_alone(text: Rows, image: Rows) -> Tensor:
    """`[questions, length, visual]` attention among visual tokens if all queries and keys were ones."""
    query, key = _rotated_ones(text), _rotated_ones(image)
    weights: Tensor = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return weights


def _rotated_ones(rows: Rows) -> Tensor:
    half = rows.sin.shape[-1] // 2
    turned = torch.cat([-rows.sin[..., :half], rows.sin[..., half:]], dim=-1)
    return rows.cos + turned


def sparsevlm(
    num_tokens: int,
    num_layers: int,
    rate: float,
    counts: int = 64,
    layers: Sequence[int] | None = None,
    raters: Literal["text", "words"] = "text",
    layer: Literal["before", "to come"] = "before",
    half: bool = False,
    level: bool = False,
) -> Pruning:
    """SparseVLM at a pruning rate.

    Args:
        counts: which of the authors' proportions.
        layers: three at which tokens leave; None: behind layers 2, 6 and 15 of 32.
    """
    if layers is None:
        layers = [max(1, round(num_layers * behind / 32)) for behind in (3, 7, 16)]
    left = scaled(num_tokens, rate, num_layers, tuple(layers), AUTHORS_COUNTS[counts])
    chooser = Raters(raters, layer, half, level)
    return Pruning(chooser.appoint, left, chooser.choose)
