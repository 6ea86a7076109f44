# SPDX-License-Identifier: Apache-2.0
"""transformers' decoder layers, one by one, on an image's tokens and many questions behind them.

The questions share the image's rows until a method gives each its own. Text is padded on the right, where no
causal attention sees it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from lab.evaluation.runner.method import Heads, LayerView, Pruning, Rows, repeat_heads


@dataclass(frozen=True)
class Texts:
    """What stands behind the image: `ids` and `words` `[questions, length]`, `lengths` `[questions]`."""

    ids: Tensor
    words: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Away:
    """Tokens that a method has left out for some layers.

    Attributes:
        every: all rows before the questions, those of the lead too, as they were embedded.
        present: `[batch, kept]` indices of the visual tokens that were there.
    """

    every: Rows
    present: Tensor

    def rejoined(self, image: Rows, lead: int) -> Rows:
        """All rows, the ones that were there as the layers have left them."""
        there = torch.cat([torch.arange(lead).expand(len(self.present), -1), self.present + lead], dim=1)
        hidden = self.every.hidden.repeat(len(image.hidden), 1, 1)
        index = there[..., None].expand(len(hidden), -1, hidden.shape[-1])
        return replace(self.every, hidden=hidden.scatter(1, index, image.hidden))


@dataclass
class LayerCache:
    """Keys and values `[batch, heads, tokens, width]` of one layer."""

    image_keys: Tensor
    image_values: Tensor
    keys: Tensor
    values: Tensor


class Decoder:
    """A language model that is run layer by layer."""

    def __init__(self, language: Any) -> None:
        self.language = language

    def rows(self, hidden: Tensor, positions: Tensor) -> Rows:
        """Tokens `[batch, tokens, hidden]` at positions `[3, batch, tokens]`."""
        return Rows(hidden, *self.language.rotary_emb(hidden, positions))

    def prefill(
        self,
        image: Rows,
        lead: int,
        text: Rows,
        texts: Texts,
        pruning: Pruning,
        away: "Away | None" = None,
    ) -> tuple[Tensor, list[LayerCache], list[int]]:
        """Run the prompts.

        Args:
            image: what stands before the questions, the first `lead` of it never pruned.
            text: the questions `[questions, length, hidden]`.
            away: what comes back where the method says so.

        Returns:
            The last hidden states `[questions, length, hidden]`, the cache, and the visual tokens per layer.
        """
        length = text.hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        cache: list[LayerCache] = []
        present: list[int] = []
        before: tuple[Heads, Heads] | None = None
        for index, layer in enumerate(self.language.layers):
            if index == pruning.rejoin:
                assert away is not None, "nothing to come back"
                assert min(pruning.stages, default=index) >= index, "what left in a stage does not come back"
                image = away.rejoined(image, lead)
            if index in pruning.stages:
                assert before is not None, "nothing can leave before layer 1"
                assert pruning.choose is not None, "stages without a choice"
                view = self._view(index, before, image, lead, text, texts, causal)
                image = image.keep(pruning.choose(view, pruning.stages[index]), lead)
            of_image, of_text = _project(layer, image), _project(layer, text)
            seen = torch.ones(length, image.hidden.shape[1], dtype=torch.bool)
            mixed = _attend(of_text.queries, of_image, of_text, torch.cat([seen, causal], dim=1))
            text = replace(text, hidden=_finish(layer, text.hidden, mixed))
            own = functional.scaled_dot_product_attention(
                of_image.queries, of_image.keys, of_image.values, is_causal=True, enable_gqa=True
            )
            image = replace(image, hidden=_finish(layer, image.hidden, own))
            cache.append(LayerCache(of_image.keys, of_image.values, of_text.keys, of_text.values))
            present.append(image.hidden.shape[1] - lead)
            before = of_image, of_text
        return self.language.norm(text.hidden), cache, present

    def step(self, token: Rows, cache: list[LayerCache], lengths: Tensor, prompt: int) -> Tensor:
        """One more token of every question `[questions, 1, hidden]`; the last hidden states of them."""
        slots = torch.arange(cache[0].keys.shape[2] + 1)
        # What was padded stays unseen; what was generated stands behind it.
        own = (slots < lengths[:, None]) | (slots >= prompt)
        for layer, kept in zip(self.language.layers, cache, strict=True):
            of_token = _project(layer, token)
            kept.keys = torch.cat([kept.keys, of_token.keys], dim=2)
            kept.values = torch.cat([kept.values, of_token.values], dim=2)
            seen = torch.ones(len(own), kept.image_keys.shape[2], dtype=torch.bool)
            mask = torch.cat([seen, own], dim=1)[:, None, None]
            query = of_token.queries
            image = Heads(query, kept.image_keys, kept.image_values)
            mixed = _attend(query, image, Heads(query, kept.keys, kept.values), mask)
            token = replace(token, hidden=_finish(layer, token.hidden, mixed))
        states: Tensor = self.language.norm(token.hidden)
        return states

    def _view(
        self,
        index: int,
        before: tuple[Heads, Heads],
        image: Rows,
        lead: int,
        text: Rows,
        texts: Texts,
        causal: Tensor,
    ) -> LayerView:
        of_image, of_text = before

        def project(rotated: bool) -> LayerView:
            layer = self.language.layers[index]
            coming = _project(layer, image, rotated), _project(layer, text, rotated)
            return self._view(index, coming, image, lead, text, texts, causal)

        queries = of_text.queries
        heads, width = queries.shape[1], queries.shape[-1]
        among = queries @ repeat_heads(of_text.keys, heads).transpose(2, 3) / width**0.5
        among = among.masked_fill(~causal, float("-inf"))
        leading = queries @ repeat_heads(of_image.keys[:, :, :lead], heads).transpose(2, 3) / width**0.5
        others = torch.cat([leading, among], dim=-1)
        visual = Heads(*(part[:, :, lead:] for part in (of_image.queries, of_image.keys, of_image.values)))
        rows = image.without(lead)
        return LayerView(
            index,
            of_text,
            visual,
            others,
            texts.lengths,
            texts.words,
            text,
            rows,
            self.language.norm,
            project,
        )


def _project(layer: Any, rows: Rows, rotated: bool = True) -> Heads:
    attention, hidden = layer.self_attn, layer.input_layernorm(rows.hidden)
    batch, count, _ = hidden.shape
    query, key, value = (
        linear(hidden).view(batch, count, -1, attention.head_dim).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if rotated:
        query, key = apply_rotary_pos_emb(query, key, rows.cos, rows.sin)
    return Heads(query, key, value)


def _attend(query: Tensor, image: Heads, text: Heads, mask: Tensor) -> Tensor:
    many = len(query)
    key = torch.cat([image.keys.expand(many, -1, -1, -1), text.keys], dim=2)
    value = torch.cat([image.values.expand(many, -1, -1, -1), text.values], dim=2)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _finish(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    finished: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return finished
