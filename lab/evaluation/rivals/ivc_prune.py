# SPDX-License-Identifier: Apache-2.0
"""IVC-Prune (Sun et al., ICLR 2026, arXiv 2602.03060; after the authors' code for Qwen2.5-VL).

Anchors are where the rotations of RoPE are nearest to the identity (largest mean cosine over frequencies and
the axes of M-RoPE) or to a quarter turn (largest mean sine). Foreground tokens are found by the values of the
layer before: text attends to the image by them, softmax over the image for every head, with all text from the
third token behind the image on. The best 1 % of the image are seeds, which attend in the same way; the mean
over the rows of text and seeds is the score. Anchors, seeds and the best scores stay.

Deviations: the authors keep half of the image, with a tenth of it as anchors by either measure, and choose at
layer 16 of 28 for the KV cache of all layers. A budget averaged over layers cannot pay for that, so tokens
leave from the chosen layer on only, earlier than theirs, or before the first, by its values. The share of
anchors is theirs of what is kept, or a number. The authors' union may hold fewer than half of the image where
its parts overlap; ours is filled up by score to the exact count.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lab.evaluation.rivals.budgets import stages
from lab.evaluation.runner.method import Kept, LayerView, Pruning, Sight, top
from vllm_crop.planning.budget import retained_count

SEEDS = 0.01  # of the image
FIRST_TEXT = 2  # tokens behind the image that do not rate
SHARE = 0.4  # anchors among the kept: 10 % of the image by either measure, of 50 % that stay
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "layer 7": {"layer": 7},
    "layer 3": {"layer": 3},
    "layer 2": {"layer": 2},
    "before the first layer": {},
    "before, 12 anchors": {"anchors": 12},
    "before, 16 anchors": {"anchors": 16},
    "before, 32 anchors": {"anchors": 32},
    "before, 64 anchors": {"anchors": 64},
    "before, no anchors": {"anchors": 0},
    "layer 3, 12 anchors": {"layer": 3, "anchors": 12},
    "layer 2, 12 anchors": {"layer": 2, "anchors": 12},
    "layer 3, 64 anchors": {"layer": 3, "anchors": 64},
    "layer 2, 64 anchors": {"layer": 2, "anchors": 64},
}


def anchors(cosines: Tensor, sines: Tensor, count: int) -> Tensor:
    """Tokens, half of `count` by either mean over frequencies `[tokens, frequencies]`; some may be both."""
    chosen = torch.zeros(len(cosines), dtype=torch.bool)
    chosen[top(cosines.mean(-1), count - count // 2)] = True
    chosen[top(sines.mean(-1), count // 2)] = True
    return chosen.nonzero()[:, 0]


def likeness(rows: Tensor, image: Tensor) -> Tensor:
    """`[rows, tokens]` attention that values `[heads, rows, width]` pay to `[heads, tokens, width]`."""
    scores: Tensor = rows @ image.transpose(1, 2) / image.shape[-1] ** 0.5
    return scores.softmax(dim=-1).mean(0)


def select(image: Tensor, text: Tensor, fixed: Tensor, count: int) -> Tensor:
    """`count` tokens by values `[heads, tokens, width]` of image and text, the fixed ones first."""
    by_text = likeness(text, image)
    seeds = top(by_text.mean(0), max(1, round(SEEDS * image.shape[1])))
    scores = torch.cat([by_text, likeness(image[:, seeds], image)]).mean(0)
    scores[torch.cat([fixed, seeds])] += 2.0  # a softmax is at most 1
    return top(scores, count)


class Chooser:
    """Finds the anchors before the first layer, and the foreground before it or at a later one."""

    def __init__(self, number_of_anchors: Callable[[int], int]) -> None:
        """`number_of_anchors`: for so many kept."""
        self.number_of_anchors = number_of_anchors
        self.cosines = self.sines = torch.empty(0)

    def look(self, sight: Sight) -> Kept:
        """Turn of every token, mean over the axes; all of them stay for now."""
        features, turn = sight.image.features, sight.language.rotary_emb
        # One axis for all frequencies; the second half of them repeats the first.
        axes = [turn(features[None], axis.expand(3, 1, -1)) for axis in sight.positions]
        half = axes[0][0].shape[-1] // 2
        self.cosines = torch.stack([cos[0, :, :half] for cos, _ in axes]).mean(0)
        self.sines = torch.stack([sin[0, :, :half] for _, sin in axes]).mean(0)
        return Kept(features[None], torch.arange(len(features))[None])

    def before(self, sight: Sight, count: int) -> Kept:
        """By the first layer's values."""
        self.look(sight)
        layer = sight.language.layers[0]

        def values(rows: Tensor) -> Tensor:
            flat = layer.self_attn.v_proj(layer.input_layernorm(rows))
            by_head: Tensor = flat.view(len(rows), -1, layer.self_attn.head_dim).transpose(0, 1)
            return by_head

        image, fixed = values(sight.image.features), self._fixed(count)
        rows = [select(image, values(text[FIRST_TEXT:]), fixed, count) for text in sight.texts]
        return Kept.choose(sight.image.features, torch.stack(rows))

    def inside(self, view: LayerView, count: int) -> Tensor:
        """By the values of the layer before."""
        fixed, rows = self._fixed(count), []
        for question, length in enumerate(view.lengths):
            image = view.image.values.expand(len(view.lengths), -1, -1, -1)[question]
            text = view.text.values[question][:, FIRST_TEXT : int(length)]
            rows.append(select(image, text, fixed, count))
        return torch.stack(rows)

    def _fixed(self, count: int) -> Tensor:
        seeds = max(1, round(SEEDS * len(self.cosines)))
        return anchors(self.cosines, self.sines, max(0, min(self.number_of_anchors(count), count - seeds)))


def ivc_prune(
    num_tokens: int, num_layers: int, rate: float, layer: int = 0, anchors: int | None = None
) -> Pruning:
    """IVC-Prune's choice at a pruning rate.

    Args:
        layer: at which tokens leave; 0: before the first.
        anchors: how many, never so many that no seed has room; None: the authors' share.
    """
    chooser = Chooser(lambda count: round(SHARE * count) if anchors is None else anchors)
    if layer:
        return Pruning(chooser.look, stages(num_tokens, rate, num_layers, (layer,)), chooser.inside)
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: chooser.before(sight, count))
