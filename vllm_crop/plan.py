# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens of one image are kept, pooled, left out or evicted, and at which layer: the TokenPlan.

Follows the contract of vllm/multimodal/video_prune: the count is known before any KV block is allocated
(`vllm_crop.budget`), and the plan delivers exactly that count.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from vllm_crop.budget import Method, retained_per_stage
from vllm_crop.geometry import Region
from vllm_crop.patches import even_patches, middle
from vllm_crop.token_grids import ImageTokens

Compression = Literal["pool", "prune"]


@dataclass(frozen=True)
class PlannedEmbedding:
    """One embedding the language model receives.

    Attributes:
        tokens: ascending token indices averaged into it; a single one is kept as it is.
        position: the token whose position id it carries when original positions are kept.
        evicted_from_layer: the first decoder layer that runs without it; None if all layers see it.
    """

    tokens: tuple[int, ...]
    position: int
    evicted_from_layer: int | None = None


@dataclass(frozen=True)
class TokenPlan:
    """What becomes of one image's visual tokens, embeddings in prompt order."""

    grid: ImageTokens
    pruning_rate: float
    embeddings: tuple[PlannedEmbedding, ...]

    @property
    def num_embeddings(self) -> int:
        """Placeholders the image takes in the prompt."""
        return len(self.embeddings)

    @property
    def compresses(self) -> bool:
        """Whether the image takes fewer placeholders than it has tokens."""
        return self.num_embeddings < self.grid.num_tokens

    @property
    def evicts(self) -> bool:
        """Whether some decoder layers run without some of the embeddings."""
        return any(embedding.evicted_from_layer is not None for embedding in self.embeddings)

    def assignment(self) -> list[int]:
        """For each token the index of the embedding it becomes part of, -1 if none."""
        assigned = [-1] * self.grid.num_tokens
        for index, embedding in enumerate(self.embeddings):
            for token in embedding.tokens:
                assigned[token] = index
        return assigned

    def tokens_per_layer(self, num_layers: int) -> list[int]:
        """How many of the image's embeddings each decoder layer runs with, `[num_layers]`."""
        leaving = Counter(embedding.evicted_from_layer for embedding in self.embeddings)
        counts, left = [], self.num_embeddings
        for layer in range(num_layers):
            left -= leaving[layer]
            counts.append(left)
        return counts

    def pruning_rate_got(self, num_layers: int) -> float:
        """The fraction of (token, layer) pairs removed."""
        full = self.grid.num_tokens * num_layers
        return 1 - sum(self.tokens_per_layer(num_layers)) / full

    def to_json(self, num_layers: int) -> dict[str, Any]:
        """The plan as `vllm-crop plan --json` prints it."""
        return {
            **self.grid.to_json(),
            "pruning_rate": self.pruning_rate,
            "pruning_rate_got": round(self.pruning_rate_got(num_layers), 6),
            "embeddings": [
                {
                    "tokens": list(embedding.tokens),
                    "position": embedding.position,
                    "evicted_from_layer": embedding.evicted_from_layer,
                }
                for embedding in self.embeddings
            ],
            "tokens_per_layer": self.tokens_per_layer(num_layers),
        }


@lru_cache(maxsize=256)
def whole_image_plan(grid: ImageTokens, pruning_rate: float = 0.0) -> TokenPlan:
    """The plan that leaves an image as it is, whatever `pruning_rate` was asked for."""
    kept = tuple(PlannedEmbedding((token,), token) for token in range(grid.num_tokens))
    return TokenPlan(grid, pruning_rate, kept)


@lru_cache(maxsize=128)  # bridges the steps of one request; clients choose the keys
def make_plan(
    grid: ImageTokens,
    region: Region,
    pruning_rate: float,
    compression: Compression,
    method: Method = "plc",
    num_layers: int = 1,
    eviction_layers: tuple[int, ...] = (),
) -> TokenPlan:
    """Spend the budget on the region first, the rest of it evenly on the context (CROP section 3.2).

    A region larger than the budget is sampled evenly and nothing else is kept. A smaller one is kept whole.
    When compressing, the remaining embeddings go to the context, each the mean of a compact patch (`pool`)
    or the token nearest to the middle of that patch (`prune`). When evicting, every stage keeps a subset of
    the embeddings of the stage before it, chosen by the same rule.

    Args:
        grid: the image's visual tokens.
        region: in fractions of what the model sees (after `ImageView.project`).
        pruning_rate: fraction of the image's (token, layer) pairs to remove, in [0, 1).
        compression: what becomes of the tokens outside the region before the language model.
        method: "ilp" passes all tokens to the language model.
        num_layers: decoder layers; the average over them is what the rate is about.
        eviction_layers: strictly ascending, in 1..num_layers-1; without meaning for "plc".

    Raises:
        BudgetError: the pruning rate cannot be met with these eviction layers.
    """
    first, *later = retained_per_stage(grid.num_tokens, pruning_rate, method, num_layers, eviction_layers)
    inside = frozenset(grid.tokens_in(region))
    embeddings = _compressed(grid, inside, first, compression)
    if later:
        positions = [embedding.position for embedding in embeddings]
        evicted = _evictions(grid, inside, positions, dict(zip(eviction_layers, later, strict=True)))
        embeddings = [replace(e, evicted_from_layer=evicted.get(e.position)) for e in embeddings]
    return TokenPlan(grid, pruning_rate, tuple(embeddings))


def _compressed(
    grid: ImageTokens, inside: Collection[int], count: int, compression: Compression
) -> list[PlannedEmbedding]:
    """The `count` embeddings the language model receives, in prompt order."""
    tokens = range(grid.num_tokens)
    if compression == "prune" or len(inside) >= count:
        return [PlannedEmbedding((token,), token) for token in _region_first(grid, inside, tokens, count)]
    kept = [PlannedEmbedding((token,), token) for token in inside]
    context = [token for token in tokens if token not in inside]
    pooled = [
        PlannedEmbedding(tuple(sorted(patch)), middle(grid, patch))
        for patch in even_patches(grid, context, count - len(kept))
    ]
    return sorted(kept + pooled, key=lambda embedding: embedding.position)


def _evictions(
    grid: ImageTokens, inside: Collection[int], positions: Sequence[int], counts: dict[int, int]
) -> dict[int, int]:
    """The layer at which each position leaves that does; `counts` are the survivors by eviction layer."""
    evicted = {}
    for layer, count in counts.items():
        kept = _region_first(grid, inside, positions, count)
        evicted.update(dict.fromkeys(set(positions).difference(kept), layer))
        positions = kept
    return evicted


def _region_first(grid: ImageTokens, inside: Collection[int], tokens: Sequence[int], count: int) -> list[int]:
    """`count` of the tokens, ascending: those inside the region before others, spread evenly."""
    region = [token for token in tokens if token in inside]
    if len(region) >= count:
        return _spread(grid, region, count)
    context = [token for token in tokens if token not in inside]
    return sorted(region + _spread(grid, context, count - len(region)))


def _spread(grid: ImageTokens, tokens: Sequence[int], count: int) -> list[int]:
    return sorted(middle(grid, patch) for patch in even_patches(grid, tokens, count))
