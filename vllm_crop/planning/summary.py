# SPDX-License-Identifier: Apache-2.0
"""A TokenPlan in a few numbers, for the terminal and the preview's caption."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import numpy as np

from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import NEVER, TokenPlan


@dataclass(frozen=True)
class PlanSummary:
    """How many tokens of one image end up where.

    Attributes:
        tokens: visual tokens of the image unpruned.
        embeddings: what the language model receives instead.
        layers: runs of decoder layers with the same number of embeddings: `(first, last, embeddings)`.
        region_tokens: tokens the region touches; None if there is no region in view.
        region_kept: those of them that all layers see as they are.
        others_kept: tokens outside the region that all layers see as they are.
        pooled: embeddings that are the mean of several tokens and that all layers see.
        pooled_tokens: the tokens in these means.
        evicted: embeddings that only the layers below see, by the layer that evicts them, ascending.
        left_out: tokens that are part of no embedding.
    """

    tokens: int
    embeddings: int
    layers: tuple[tuple[int, int, int], ...]
    region_tokens: int | None
    region_kept: int
    others_kept: int
    pooled: int
    pooled_tokens: int
    evicted: tuple[tuple[int, int], ...]
    left_out: int

    @classmethod
    def of(cls, plan: TokenPlan, region: Region | None, num_layers: int) -> Self:
        """Count a plan's embeddings.

        Args:
            plan: of a model of `num_layers` decoder layers.
            region: in fractions of what the model sees.
            num_layers: at least 1.

        Raises:
            ValueError: the plan evicts at a layer that such a model does not have.
        """
        seen_by_all = plan.evicted_from_layer == NEVER
        evicted = Counter(plan.evicted_from_layer[~seen_by_all].tolist())
        if any(layer >= num_layers for layer in evicted):
            raise ValueError(f"the plan evicts from layer {max(evicted)}, beyond {num_layers} layers")
        sizes = plan.sizes
        kept, pooled = seen_by_all & (sizes == 1), seen_by_all & (sizes > 1)
        inside = plan.grid.mask(region) if region else np.zeros(plan.grid.num_tokens, dtype=bool)
        region_kept = int(inside[plan.position[kept]].sum())
        return cls(
            tokens=plan.grid.num_tokens,
            embeddings=plan.num_embeddings,
            layers=_runs(plan.tokens_per_layer(num_layers)),
            region_tokens=int(inside.sum()) if region else None,
            region_kept=region_kept,
            others_kept=int(kept.sum()) - region_kept,
            pooled=int(pooled.sum()),
            pooled_tokens=int(sizes[pooled].sum()),
            evicted=tuple(sorted(evicted.items())),
            left_out=int((plan.assignment < 0).sum()),
        )

    @property
    def average(self) -> float:
        """Embeddings a decoder layer runs with, averaged over layers."""
        _, last, _ = self.layers[-1]
        return sum((end - start + 1) * count for start, end, count in self.layers) / (last + 1)

    @property
    def after(self) -> str:
        """What is left, such as "96 tokens" or, averaged over layers, "127.9 tokens per layer"."""
        if self.evicted:
            return f"{round(self.average, 1):g} tokens per layer"
        return f"{self.embeddings} tokens"

    @property
    def change(self) -> str:
        """What pruning saves, averaged over layers, such as "-83.3 %"."""
        return f"{100 * (self.average / self.tokens - 1):.1f} %" if self.average < self.tokens else "0 %"

    def describe(self) -> str:
        """One line such as "region 36 kept, 60 pooled"."""
        if self.average == self.tokens:
            return "served whole, all tokens kept"
        of_all = f" of {self.region_tokens}" if self.region_kept != self.region_tokens else ""
        parts = [] if self.region_tokens is None else [f"region {self.region_kept}{of_all} kept"]
        if self.others_kept:
            parts.append(f"{self.others_kept} others kept")
        if self.pooled:
            parts.append(f"{self.pooled} pooled")
        parts += [f"{count} evicted from layer {layer}" for layer, count in self.evicted]
        if self.left_out:
            parts.append(f"{self.left_out} left out")
        return ", ".join(parts)

    def describe_layers(self) -> str:
        """One line such as "layers 0-1: 576, layers 2-31: 98"."""
        return ", ".join(
            f"{f'layer {start}' if start == end else f'layers {start}-{end}'}: {count}"
            for start, end, count in self.layers
        )


def _runs(counts: list[int]) -> tuple[tuple[int, int, int], ...]:
    runs, start = [], 0
    for count, group in groupby(counts):
        end = start + len(list(group)) - 1
        runs.append((start, end, count))
        start = end + 1
    return tuple(runs)
