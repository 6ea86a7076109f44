# SPDX-License-Identifier: Apache-2.0
"""What all pruning methods have in common: what they may look at, and what they say.

A method decides before the language model, from what the image and the questions are (`Sight`), or between
two of its layers, from what these have computed (`LayerView`). What is known before the forward pass could be
served by the engine as it is; what needs attention could not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vllm_crop.planning.geometry import TokenGrid


@dataclass(frozen=True)
class Seen:
    """One image, as the vision tower has seen it; `n` visual tokens in raster order.

    Attributes:
        features: `[n, hidden]` embeddings that the language model receives.
        keys: `[n, width]` of the tower's last attention over the whole image, mean over a token's patches.
        received: `[n]` how much attention a token's patches receive there, on average over patches and heads.
    """

    features: Tensor
    grid: TokenGrid
    keys: Tensor
    received: Tensor


@dataclass(frozen=True)
class Sight:
    """What a method may look at before the language model runs.

    Attributes:
        words: per question the embeddings `[words, hidden]` of its words.
        positions: `[3, n]` M-RoPE positions of the visual tokens.
        language: transformers' language model, for methods that look into its weights.
    """

    image: Seen
    words: tuple[Tensor, ...]
    positions: Tensor
    language: Any


@dataclass(frozen=True)
class Kept:
    """The visual tokens that the language model receives.

    Attributes:
        features: `[batch, kept, hidden]`; a batch of one is shared by all questions.
        tokens: `[batch, kept]` ascending grid indices whose positions they carry.
    """

    features: Tensor
    tokens: Tensor

    @classmethod
    def choose(cls, features: Tensor, tokens: Tensor) -> "Kept":
        """Keep tokens `[batch, kept]`, in any order, as they are."""
        ascending = tokens.sort(dim=-1).values
        return cls(features[ascending], ascending)


@dataclass(frozen=True)
class LayerView:
    """What a method may look at before decoder layer `layer` runs.

    Attributes:
        text_queries: `[questions, heads, length, width]` of the layer before, rotated.
        image_keys: `[batch, heads, visual, width]` of the layer before; a batch of one is shared.
        other_scores: `[questions, heads, length, others]` scores of all other tokens in sight, -inf if not.
        lengths: `[questions]` words of each prompt behind the image; the rest is padding.
        words: `[questions, length]` true for the words of the question itself.
        next_view: the same with the projections of the layer about to run.
    """

    layer: int
    text_queries: Tensor
    image_keys: Tensor
    other_scores: Tensor
    lengths: Tensor
    words: Tensor
    next_view: Callable[[], "LayerView"]

    def attention(self) -> Tensor:
        """`[questions, length, visual]` attention that text pays to visual tokens, mean over heads."""
        keys = repeat_heads(self.image_keys, self.text_queries.shape[1])
        scores = self.text_queries @ keys.transpose(2, 3) / self.text_queries.shape[-1] ** 0.5
        both = functional.softmax(torch.cat([scores, self.other_scores], dim=-1), dim=-1)
        return both[..., : scores.shape[-1]].mean(1)

    def last_word_attention(self) -> Tensor:
        """`[questions, visual]` attention of the token that the answer follows."""
        return self.attention()[torch.arange(len(self.lengths)), self.lengths - 1]


def repeat_heads(keys: Tensor, heads: int) -> Tensor:
    """Grouped-query keys, one per query head."""
    return keys.repeat_interleave(heads // keys.shape[1], dim=1)


Chooser = Callable[[LayerView, int], Tensor]  # -> indices [questions, kept] into the visual tokens present


@dataclass(frozen=True)
class Pruning:
    """One method at one budget, for the questions about one image.

    Attributes:
        before: what the language model receives; None: all tokens.
        stages: visual tokens left from each layer on at which some leave.
        choose: says which.
    """

    before: Callable[[Sight], Kept] | None = None
    stages: Mapping[int, int] = field(default_factory=dict)
    choose: Chooser | None = None


def top(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` highest scores along the last dimension; the first of equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values
