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
        early: the same of the tower's first attention over the whole image; of tinyvqa that is the last, too.
        attention: `[n, n]` what each token's patches attend to in the tower's last attention over the whole
            image, on average over patches and heads; rows sum to one.
        tower: `[n, width]` what the tower makes of a token's patches, side by side, before they are merged.
        entropy: `[n]` bits of the grey levels that a token shows.
        fingerprint: of the picture; the same wherever it is seen.
    """

    features: Tensor
    grid: TokenGrid
    keys: Tensor
    received: Tensor
    early: Tensor
    attention: Tensor
    tower: Tensor
    entropy: Tensor
    fingerprint: int


@dataclass(frozen=True)
class Sight:
    """What a method may look at before the language model runs.

    Attributes:
        words: per question the embeddings `[words, hidden]` of its words.
        spelled: per question these words as text.
        texts: per question the embeddings `[length, hidden]` of all that stands behind the image.
        positions: `[3, n]` M-RoPE positions of the visual tokens.
        language: transformers' language model, for methods that look into its weights.
    """

    image: Seen
    words: tuple[Tensor, ...]
    spelled: tuple[tuple[str, ...], ...]
    texts: tuple[Tensor, ...]
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
class Rows:
    """Tokens with their rotations; `[batch, tokens, ...]`, a batch of one is shared by all questions."""

    hidden: Tensor
    cos: Tensor
    sin: Tensor

    def keep(self, index: Tensor, lead: int) -> "Rows":
        """The first `lead` tokens, and of those behind them `index` `[questions, kept]`."""
        leading = torch.arange(lead).expand(len(index), -1)
        every = torch.cat([leading, index + lead], dim=1)
        return Rows(*(_gather(part, every) for part in (self.hidden, self.cos, self.sin)))

    def without(self, lead: int) -> "Rows":
        """All but the first `lead` tokens."""
        return Rows(*(part[:, lead:] for part in (self.hidden, self.cos, self.sin)))


def _gather(part: Tensor, index: Tensor) -> Tensor:
    part = part.expand(len(index), -1, -1)
    return part.gather(1, index[..., None].expand(-1, -1, part.shape[-1]))


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values `[batch, heads, tokens, width]` of some tokens in one layer."""

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerView:
    """What a method may look at before decoder layer `layer` runs.

    Attributes:
        text: what the layer before projected of what stands behind the image, rotated; a batch of questions.
        image: the same of the visual tokens; a batch of one is shared.
        other_scores: `[questions, heads, length, others]` scores of all other tokens in sight, -inf if not.
        lengths: `[questions]` words of each prompt behind the image; the rest is padding.
        words: `[questions, length]` true for the words of the question itself.
        text_rows: what the layer before has made of what stands behind the image.
        image_rows: the same of the visual tokens.
        norm: the language model's last norm, for those who compare states.
        project: the same view with the projections of the layer about to run, rotated or not.
    """

    layer: int
    text: Heads
    image: Heads
    other_scores: Tensor
    lengths: Tensor
    words: Tensor
    text_rows: Rows
    image_rows: Rows
    norm: Callable[[Tensor], Tensor]
    project: Callable[[bool], "LayerView"]

    def next_view(self, rotated: bool = True) -> "LayerView":
        """With the projections of the layer about to run."""
        return self.project(rotated)

    def attention_by_head(self) -> Tensor:
        """`[questions, heads, length, visual]` attention that text pays to visual tokens."""
        keys = repeat_heads(self.image.keys, self.text.queries.shape[1])
        scores = self.text.queries @ keys.transpose(2, 3) / self.text.queries.shape[-1] ** 0.5
        both = functional.softmax(torch.cat([scores, self.other_scores], dim=-1), dim=-1)
        return both[..., : scores.shape[-1]]

    def attention(self) -> Tensor:
        """`[questions, length, visual]` attention that text pays to visual tokens, mean over heads."""
        return self.attention_by_head().mean(1)

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
        rejoin: the layer before which all tokens that `before` left out come back, as they were embedded.
    """

    before: Callable[[Sight], Kept] | None = None
    stages: Mapping[int, int] = field(default_factory=dict)
    choose: Chooser | None = None
    rejoin: int | None = None


def squares_of(grid: TokenGrid, side: int) -> Tensor:
    """`[tokens]`: the number of each token's square of `side` by `side` tokens, in raster order."""
    index = torch.arange(grid.num_tokens)
    across = -(-grid.cols // side)
    return index // grid.cols // side * across + index % grid.cols // side


def top(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` highest scores along the last dimension; the first of equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values
