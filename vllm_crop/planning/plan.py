# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens of one image are kept, pooled, left out or evicted, and at which layer: the TokenPlan.

Follows the contract of vllm/multimodal/video_prune: the count is known before any KV block is allocated
(`vllm_crop.planning.budget`), and the plan delivers exactly that count.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray

from vllm_crop.planning.budget import Method, retained_per_stage, rim_count
from vllm_crop.planning.foveation import sources, whole_piece
from vllm_crop.planning.geometry import ImageTokens, Indices, Mask, Places, Region, TokenGrid
from vllm_crop.planning.groups import Groups, even_groups, middles

logger = logging.getLogger("vllm.plugins.crop")

Compression = Literal["pool", "prune", "foveate", "resampler"]

NEVER = np.iinfo(np.int32).max  # greater than any decoder layer

# Bytes of plans kept for the next request about the same part of the same picture, as in a conversation: some
# 600 of LLaVA-1.5's 576 tokens, 20 of 16384. Clients choose the keys, so count is no bound.
CACHE_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """What becomes of one image's visual tokens, embeddings in prompt order. The arrays cannot be written to.

    Attributes:
        assignment: the embedding each token becomes part of, -1 if none, `[num_tokens]` int32. An embedding
            is the mean of its tokens; a single one is kept as it is.
        position: the token whose position id an embedding carries when original positions are kept,
            ascending, `[num_embeddings]` int32.
        evicted_from_layer: the first decoder layer that runs without an embedding, NEVER if all layers see
            it, `[num_embeddings]` int32.
        zone: for compression "resampler", which reads the zones of an image apart: the one of each token (see
            `Zones.codes`), `[num_tokens]` uint8. None for others.
    """

    grid: ImageTokens
    pruning_rate: float
    assignment: NDArray[np.int32]
    position: NDArray[np.int32]
    evicted_from_layer: NDArray[np.int32]
    zone: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        for array in self._arrays:
            array.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenPlan):
            return NotImplemented
        ours, theirs = self._arrays, other._arrays
        return (
            (self.grid, self.pruning_rate, len(ours)) == (other.grid, other.pruning_rate, len(theirs))
        ) and all(map(np.array_equal, ours, theirs))

    def __hash__(self) -> int:
        return hash((self.grid, self.pruning_rate, *(array.tobytes() for array in self._arrays)))

    @property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        zone = () if self.zone is None else (self.zone,)
        return self.assignment, self.position, self.evicted_from_layer, *zone

    @property
    def num_embeddings(self) -> int:
        """Placeholders the image takes in the prompt."""
        return len(self.position)

    @property
    def compresses(self) -> bool:
        """Whether the image takes fewer placeholders than it has tokens."""
        return self.num_embeddings < self.grid.num_tokens

    @cached_property
    def evicts(self) -> bool:
        """Whether some decoder layers run without some of the embeddings."""
        return bool((self.evicted_from_layer != NEVER).any())

    @property
    def eviction_layers(self) -> list[int]:
        """The layers at which embeddings leave, ascending."""
        layers: list[int] = np.unique(self.evicted_from_layer[self.evicted_from_layer != NEVER]).tolist()
        return layers

    @property
    def sizes(self) -> Indices:
        """How many tokens each embedding has, `[num_embeddings]`."""
        return np.bincount(self.assignment[self.assignment >= 0], minlength=self.num_embeddings)

    def members(self) -> list[list[int]]:
        """List the tokens of each embedding, ascending."""
        by_embedding = self.assignment.argsort(kind="stable").tolist()
        ends = (self.sizes.cumsum() + np.count_nonzero(self.assignment < 0)).tolist()
        return [by_embedding[end - size : end] for end, size in zip(ends, self.sizes.tolist(), strict=True)]

    def tokens_per_layer(self, num_layers: int) -> list[int]:
        """Count the image's embeddings that each decoder layer runs with, `[num_layers]`."""
        leaving = np.bincount(
            self.evicted_from_layer[self.evicted_from_layer < num_layers], minlength=num_layers
        )
        left: list[int] = (self.num_embeddings - leaving.cumsum()).tolist()
        return left

    def tokens_avg(self, num_layers: int) -> float:
        """Count the image's embeddings that a decoder layer runs with, averaged over the layers."""
        if not self.evicts:
            return float(self.num_embeddings)
        return int(np.minimum(self.evicted_from_layer, num_layers).sum()) / num_layers

    def pruning_rate_got(self, num_layers: int) -> float:
        """The fraction of (token, layer) pairs removed."""
        full = self.grid.num_tokens * num_layers
        return 1 - sum(self.tokens_per_layer(num_layers)) / full

    def to_json(self, num_layers: int) -> dict[str, Any]:
        """The plan as `vllm-crop plan --json` prints it."""
        layers = [None if layer == NEVER else layer for layer in self.evicted_from_layer.tolist()]
        embeddings = zip(self.members(), self.position.tolist(), layers, strict=True)
        return {
            **self.grid.to_json(),
            "pruning_rate": self.pruning_rate,
            "pruning_rate_got": round(self.pruning_rate_got(num_layers), 6),
            "embeddings": [
                {"tokens": tokens, "position": position, "evicted_from_layer": layer}
                for tokens, position, layer in embeddings
            ],
            "tokens_per_layer": self.tokens_per_layer(num_layers),
        }


def whole_image_plan(grid: ImageTokens, pruning_rate: float = 0.0) -> TokenPlan:
    """Leave an image as it is, whatever `pruning_rate` was asked for."""
    tokens = np.arange(grid.num_tokens, dtype=np.int32)
    return TokenPlan(grid, pruning_rate, tokens, tokens, np.full_like(tokens, NEVER))


def make_plan(
    grid: ImageTokens,
    region: Region,
    pruning_rate: float,
    compression: Compression,
    method: Method = "plc",
    num_layers: int = 1,
    eviction_layers: tuple[int, ...] = (),
    around: Region | None = None,
    unseen: Mask | None = None,
) -> TokenPlan:
    """Spend the budget on the region first, the rest of it on the context (CROP section 3.2).

    A region larger than the budget is sampled evenly and nothing else is kept. A smaller one is kept whole.
    The context in its rim gets a larger share than what is far away (`budget.rim_count`): whoever finds
    regions errs by a little.
    When compressing, the remaining embeddings go to the context, each the mean of a compact group (`pool`)
    or the token nearest to the middle of that group (`prune`). When evicting, every stage keeps a subset of
    the embeddings of the stage before it, chosen by the same rule.

    Args:
        grid: the image's visual tokens.
        region: in fractions of what the model sees (after `ImageView.project`).
        pruning_rate: fraction of the image's (token, layer) pairs to remove, in [0, 1).
        compression: what becomes of the tokens outside the region before the language model; the counts and
            groups of "foveate" and "resampler" are those of "pool".
        method: "ilp" passes all tokens to the language model.
        num_layers: decoder layers; the average over them is what the rate is about.
        eviction_layers: strictly ascending, in 1..num_layers-1; without meaning for "plc".
        around: the region with its rim; None for a region without one.
        unseen: tokens that are left out whatever the budget leaves room for, but for those of the region and
            its rim, `[num_tokens]`.

    Raises:
        BudgetError: the pruning rate cannot be met with these eviction layers.
    """
    inside = grid.mask(region)
    rim = np.zeros_like(inside) if around is None else grid.mask(around) & ~inside
    left_out = np.zeros_like(inside) if unseen is None else unseen & ~(inside | rim)
    counts = retained_per_stage(grid.num_tokens, pruning_rate, method, num_layers, eviction_layers)
    return _plan_counts(
        grid, Zones(inside, rim, left_out), pruning_rate, compression, counts, eviction_layers
    )


def overview_plan(grid: ImageTokens, unseen: Mask, pruning_rate: float) -> TokenPlan:
    """Spend the budget evenly on tokens that are seen, each kept as it is, and leave out the others.

    Args:
        unseen: `[num_tokens]`.
    """
    zones = Zones(~unseen, np.zeros_like(unseen), unseen)
    return _plan_counts(
        grid,
        zones,
        pruning_rate,
        "prune",
        retained_per_stage(grid.num_tokens, pruning_rate, "plc", 1, ()),
        (),
    )


def even_plan(
    grid: ImageTokens, count: int, compression: Compression, unseen: Mask | None = None
) -> TokenPlan:
    """Spend `count` embeddings on all of an image alike, or on those tokens of it that are seen.

    Args:
        compression: "prune" keeps one token of each group, else the group's mean is kept.
        unseen: tokens that are left out, `[num_tokens]`.
    """
    nowhere = np.zeros(grid.num_tokens, dtype=bool)
    zones = Zones(nowhere, nowhere, nowhere if unseen is None else unseen)
    count = min(count, int((~zones.left_out).sum()))
    return _plan_counts(grid, zones, 1 - count / grid.num_tokens, compression, (count,), ())


def small_plan(grid: TokenGrid, small: TokenGrid) -> TokenPlan:
    """Let an image be what it is at another scale: an embedding for each token there."""
    scale = (whole_piece(small),)
    row, col = (
        (2 * np.arange(few) + 1) * many // (2 * few)
        for few, many in ((small.rows, grid.rows), (small.cols, grid.cols))
    )
    position = (row[:, None] * grid.cols + col).reshape(-1).astype(np.int32)
    assignment = sources(grid, scale).astype(np.int32)
    stays = np.full_like(position, NEVER)
    return TokenPlan(grid, 1 - small.num_tokens / grid.num_tokens, assignment, position, stays)


# `vllm_crop.planning.compiled_plan.plan`; see use_compiled.
_compiled: Callable[..., tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]] | None = None


def use_compiled() -> bool:
    """Make plans by compiled code from now on, in this process, if numba is there to compile it.

    For processes that make plan after plan: the first call takes some hundred milliseconds, seconds where
    nothing was compiled before, later ones nothing. Plans are the same either way. Never fails: without numba
    they are made by numpy.

    Returns:
        Whether it is compiled code.
    """
    global _compiled
    if _compiled is None:
        try:
            from vllm_crop.planning.compiled_plan import plan
        except Exception as error:  # numba refuses numpy versions, platforms and folders in many ways
            logger.info("Plans are made by numpy, compiled code would be quicker: %s", error)
        else:
            _compiled = plan
    return _compiled is not None


class Zones(NamedTuple):
    """The parts of an image that get different shares of the budget; what is in neither is far away.

    Attributes:
        inside: the tokens of the region, `[num_tokens]`.
        rim: those next to it, none of the region's, `[num_tokens]`.
        left_out: those that get nothing, none of the others, `[num_tokens]`.
    """

    inside: Mask
    rim: Mask
    left_out: Mask

    def codes(self) -> NDArray[np.uint8]:
        """Of each token its zone, `[num_tokens]`: 0 far away, 1 inside, 2 in the rim, 3 left out."""
        inside, rim, left_out = (zone.view(np.uint8) for zone in self)
        return inside + 2 * rim + 3 * left_out


def _held_bytes(plan: TokenPlan) -> int:
    """What a plan and its key take in the cache, some hundred bytes of objects included."""
    return sum(array.nbytes for array in plan._arrays) + len(Zones._fields) * plan.grid.num_tokens // 8 + 1024


def _key(grid: ImageTokens, zones: Zones, *rest: Hashable) -> Hashable:
    """A few bytes whatever the number of boxes: regions of the same tokens have the same plan."""
    return (grid, *(np.packbits(zone).tobytes() for zone in zones), *rest)


@cached(LRUCache[Hashable, TokenPlan](CACHE_BYTES, getsizeof=_held_bytes), key=_key, lock=Lock())
def _plan_counts(
    grid: ImageTokens,
    zones: Zones,
    pruning_rate: float,
    compression: Compression,
    counts: tuple[int, ...],
    eviction_layers: tuple[int, ...],
) -> TokenPlan:
    """Make a plan for counts that are known: of all embeddings, then after each eviction."""
    places = places_of(grid)
    if _compiled is not None:
        pools = compression != "prune"
        planned = _compiled(places, zones.codes(), pools, counts, eviction_layers, NEVER)
        zone = _read_apart(zones, planned[0]) if compression == "resampler" else None
        return TokenPlan(grid, pruning_rate, *planned, zone)
    first, *later = counts
    assignment, position = _compressed(places, zones, first, compression)
    leaves_at = np.full(grid.num_tokens, NEVER, dtype=np.int32)
    left = position
    for layer, count in zip(eviction_layers, later, strict=False):
        leaves_at[left] = layer
        left = _region_first(places, zones, left, min(count, len(left)))
        leaves_at[left] = NEVER
    zone = _read_apart(zones, assignment) if compression == "resampler" else None
    return TokenPlan(grid, pruning_rate, assignment, position.astype(np.int32), leaves_at[position], zone)


def _read_apart(zones: Zones, assignment: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The zone of each token, each embedding of one alone.

    Where a single embedding is left for all that is outside the region, its group has tokens of the rim and
    of what is far away: then there is no rim.
    """
    codes = zones.codes()
    stays = assignment >= 0
    least = np.full(assignment.max() + 1, len(Zones._fields), dtype=np.uint8)
    np.minimum.at(least, assignment[stays], codes[stays])
    if (least[assignment[stays]] < codes[stays]).any():
        codes[zones.rim] = 0
    return codes


@lru_cache(maxsize=8)  # pictures of one size often come one after another
def places_of(grid: ImageTokens) -> Places:
    """Where every token of an image is; the arrays cannot be written to."""
    places = grid.places()
    for array in places:
        array.setflags(write=False)
    return places


def _compressed(
    places: Places, zones: Zones, count: int, compression: Compression
) -> tuple[NDArray[np.int32], Indices]:
    """The assignment, and the positions of the `count` embeddings the language model receives."""
    tokens = np.flatnonzero(~zones.left_out)
    count = min(count, len(tokens))
    assignment = np.full(len(zones.inside), -1, dtype=np.int32)
    region = zones.inside.nonzero()[0]
    if compression == "prune" or len(region) >= count:
        position = _region_first(places, zones, tokens, count)
        assignment[position] = np.arange(count)
        return assignment, position
    groups = _context(places, zones.rim, tokens[~zones.inside[tokens]], count - len(region))
    middle = middles(places, groups)
    position = np.sort(np.concatenate([region, middle]))
    assignment[position] = np.arange(count)
    assignment[groups.tokens] = assignment[middle].repeat(groups.sizes)
    return assignment, position


def _region_first(places: Places, zones: Zones, tokens: Indices, count: int) -> Indices:
    """`count` of the tokens, ascending: those inside the region before others, spread evenly."""
    within = zones.inside[tokens]
    region = tokens[within]
    if len(region) >= count:
        return np.sort(middles(places, even_groups(places, region, count)))
    context = middles(places, _context(places, zones.rim, tokens[~within], count - len(region)))
    return np.sort(np.concatenate([region, context]))


def _context(places: Places, rim: Mask, tokens: Indices, count: int) -> Groups:
    """`count` groups of tokens outside the region, smaller ones in its rim."""
    near = rim[tokens]
    if count < 2:
        return even_groups(places, tokens, count)
    next_to, far = tokens[near], tokens[~near]
    of_rim = rim_count(len(next_to), len(far), count)
    parts = even_groups(places, next_to, of_rim), even_groups(places, far, count - of_rim)
    return Groups(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
