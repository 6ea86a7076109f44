# SPDX-License-Identifier: Apache-2.0
"""A TokenPlan in a few numbers, for the terminal and the preview's caption."""

from dataclasses import dataclass
from typing import Self

from vllm_crop.geometry import Region
from vllm_crop.plan import TokenPlan


@dataclass(frozen=True)
class PlanSummary:
    """How many tokens of one image end up where.

    Attributes:
        tokens: visual tokens of the image unpruned.
        embeddings: what the language model receives instead.
        region_tokens: tokens the region touches; None if there is no region in view.
        region_kept: those of them that are kept as they are.
        others_kept: tokens outside the region that are kept as they are.
        pooled: embeddings that are the mean of several tokens.
        pooled_tokens: the tokens in these means.
    """

    tokens: int
    embeddings: int
    region_tokens: int | None
    region_kept: int
    others_kept: int
    pooled: int
    pooled_tokens: int

    @classmethod
    def of(cls, plan: TokenPlan, region: Region | None) -> Self:
        """Count a plan's embeddings; `region` in fractions of what the model sees."""
        inside = set(plan.grid.tokens_in(region)) if region else set()
        sizes = [len(embedding.tokens) for embedding in plan.embeddings]
        kept = [embedding.tokens[0] for embedding in plan.embeddings if len(embedding.tokens) == 1]
        region_kept = sum(token in inside for token in kept)
        return cls(
            tokens=plan.grid.num_tokens,
            embeddings=plan.num_embeddings,
            region_tokens=len(inside) if region else None,
            region_kept=region_kept,
            others_kept=len(kept) - region_kept,
            pooled=sum(size > 1 for size in sizes),
            pooled_tokens=sum(size for size in sizes if size > 1),
        )

    @property
    def left_out(self) -> int:
        """Tokens that are part of no embedding."""
        return self.tokens - self.region_kept - self.others_kept - self.pooled_tokens

    @property
    def change(self) -> str:
        """What pruning saves, such as "-83.3 %"."""
        return (
            f"{100 * (self.embeddings / self.tokens - 1):.1f} %" if self.embeddings < self.tokens else "0 %"
        )

    def describe(self) -> str:
        """One line such as "region 36 kept, 60 pooled"."""
        if self.embeddings == self.tokens:
            return "served whole, all tokens kept"
        of_all = f" of {self.region_tokens}" if self.region_kept != self.region_tokens else ""
        parts = [f"region {self.region_kept}{of_all} kept"]
        if self.others_kept:
            parts.append(f"{self.others_kept} others kept")
        if self.pooled:
            parts.append(f"{self.pooled} pooled")
        if self.left_out:
            parts.append(f"{self.left_out} left out")
        return ", ".join(parts)
