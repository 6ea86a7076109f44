# SPDX-License-Identifier: Apache-2.0
"""The plan written out token by token and group by group: slow, and what the product's arrays must equal."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vllm_crop.planning.budget import (
    Method,
    check_eviction_layers,
    method_evicts,
    retained_count,
    target_average,
)
from vllm_crop.planning.geometry import GridPart, ImageTokens, ImageView, Region, TokenGrid, TokenGrids
from vllm_crop.planning.plan import NEVER, Compression, TokenPlan

_SIMILAR = 1.2  # how much larger the groups on one side of a cut may be, on average


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


def embeddings_of(plan: TokenPlan) -> tuple[PlannedEmbedding, ...]:
    """A plan's embeddings one by one, in prompt order."""
    return tuple(
        PlannedEmbedding(tuple(tokens), position, None if layer == NEVER else layer)
        for tokens, position, layer in zip(
            plan.members(), plan.position.tolist(), plan.evicted_from_layer.tolist(), strict=True
        )
    )


def plan_of(grid: ImageTokens, pruning_rate: float, embeddings: Sequence[PlannedEmbedding]) -> TokenPlan:
    """The plan of these embeddings."""
    assignment = np.full(grid.num_tokens, -1, dtype=np.int32)
    for index, embedding in enumerate(embeddings):
        assignment[list(embedding.tokens)] = index
    layers = [NEVER if e.evicted_from_layer is None else e.evicted_from_layer for e in embeddings]
    positions = np.array([e.position for e in embeddings], dtype=np.int32)
    return TokenPlan(grid, pruning_rate, assignment, positions, np.array(layers, dtype=np.int32))


class Place(NamedTuple):
    """Where a token is. Only tokens of one part are neighbours and averaged with each other."""

    part: int
    row: int
    col: int


def tokens_in(grid: ImageTokens, region: Region) -> tuple[int, ...]:
    """Ascending indices of the tokens whose area the region touches, and of the newlines of their rows."""
    if isinstance(grid, TokenGrids):
        return tuple(sorted(token for part in grid.parts for token in _tokens_of_part(part, region)))
    spans = [grid.span(box) for box in region.boxes]
    return tuple(
        sorted(
            {
                row * grid.cols + col
                for row0, row1, col0, col1 in spans
                for row in range(row0, row1)
                for col in range(col0, col1)
            }
        )
    )


def _tokens_of_part(part: GridPart, region: Region) -> set[int]:
    seen = ImageView(part.window).project(region)
    if seen is None or not part.grid.num_tokens:
        return set()
    spans = [part.grid.span(box) for box in seen.boxes]
    return {
        part.token(row, col)
        for row0, row1, col0, col1 in spans
        for row in range(row0, row1)
        for col in [*range(col0, col1), *range(part.grid.cols, part.row_length)]
    }


def place_of(grid: ImageTokens, token: int) -> Place:
    """Where a token is. Every grid of several is a part of its own, and so are its newlines."""
    if isinstance(grid, TokenGrid):
        return Place(0, *divmod(token, grid.cols))
    index = max(index for index, part in enumerate(grid.parts) if part.first <= token)
    part = grid.parts[index]
    row, col = divmod(token - part.first, part.row_length)
    if col == part.grid.cols:
        return Place(2 * index + 1, row, 0)
    return Place(2 * index, row, col)


def retained_per_stage(
    num_tokens: int, pruning_rate: float, method: Method, num_layers: int, eviction_layers: Sequence[int]
) -> tuple[int, ...]:
    """`retained_per_stage` of planning/budget.py with all 60 bisections, without its check of what fits."""
    if method == "off":
        return (num_tokens,)
    if not method_evicts(method):
        return (retained_count(num_tokens, pruning_rate),)
    check_eviction_layers(eviction_layers, num_layers)
    target = target_average(num_tokens, pruning_rate)
    widths = [end - start for start, end in pairwise([0, *eviction_layers, num_layers])]
    stages = range(len(widths)) if method == "ilp" else range(1, len(widths) + 1)

    def sizes(fraction: float) -> list[float]:
        return [max(1.0, num_tokens * fraction**stage) for stage in stages]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(width * size for width, size in zip(widths, sizes(middle), strict=True))
        low, high = (middle, high) if total <= target * num_layers else (low, middle)
    return tuple(round(size) for size in sizes(high))


def slow_plan(
    grid: ImageTokens,
    region: Region,
    pruning_rate: float,
    compression: Compression,
    method: Method = "plc",
    num_layers: int = 1,
    eviction_layers: tuple[int, ...] = (),
    around: Region | None = None,
) -> tuple[PlannedEmbedding, ...]:
    """The embeddings that `vllm_crop.planning.plan.make_plan` plans, in prompt order."""
    first, *later = retained_per_stage(grid.num_tokens, pruning_rate, method, num_layers, eviction_layers)
    inside = frozenset(tokens_in(grid, region))
    rim = frozenset(tokens_in(grid, around)) - inside if around else frozenset[int]()
    embeddings = _compressed(grid, inside, rim, first, compression)
    if later:
        positions = [embedding.position for embedding in embeddings]
        evicted = _evictions(grid, inside, rim, positions, dict(zip(eviction_layers, later, strict=True)))
        embeddings = [replace(e, evicted_from_layer=evicted.get(e.position)) for e in embeddings]
    return tuple(embeddings)


def _compressed(
    grid: ImageTokens, inside: Collection[int], rim: Collection[int], count: int, compression: Compression
) -> list[PlannedEmbedding]:
    """The `count` embeddings the language model receives, in prompt order."""
    tokens = range(grid.num_tokens)
    if compression == "prune" or len(inside) >= count:
        return [
            PlannedEmbedding((token,), token) for token in _region_first(grid, inside, rim, tokens, count)
        ]
    kept = [PlannedEmbedding((token,), token) for token in inside]
    context = [token for token in tokens if token not in inside]
    pooled = [
        PlannedEmbedding(tuple(sorted(group)), middle(grid, group))
        for group in _context(grid, rim, context, count - len(kept))
    ]
    return sorted(kept + pooled, key=lambda embedding: embedding.position)


def _evictions(
    grid: ImageTokens,
    inside: Collection[int],
    rim: Collection[int],
    positions: Sequence[int],
    counts: dict[int, int],
) -> dict[int, int]:
    """The layer at which each position leaves that does; `counts` are the survivors by eviction layer."""
    evicted = {}
    for layer, count in counts.items():
        kept = _region_first(grid, inside, rim, positions, count)
        evicted.update(dict.fromkeys(set(positions).difference(kept), layer))
        positions = kept
    return evicted


def _region_first(
    grid: ImageTokens, inside: Collection[int], rim: Collection[int], tokens: Sequence[int], count: int
) -> list[int]:
    """`count` of the tokens, ascending: those inside the region before others, spread evenly."""
    region = [token for token in tokens if token in inside]
    if len(region) >= count:
        return sorted(middle(grid, group) for group in even_groups(grid, region, count))
    context = [token for token in tokens if token not in inside]
    groups = _context(grid, rim, context, count - len(region))
    return sorted(region + [middle(grid, group) for group in groups])


def _context(grid: ImageTokens, rim: Collection[int], tokens: Sequence[int], count: int) -> list[list[int]]:
    """`count` groups of tokens outside the region, smaller ones in its rim.

    A far token has s * s of an embedding and one of the rim s, where the region's have one each.
    """
    if count < 2:
        return even_groups(grid, tokens, count)
    near, far = [token for token in tokens if token in rim], [token for token in tokens if token not in rim]
    of_rim = count if near else 0
    if near and far:
        low, high = 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            low, high = (share, high) if len(near) * share + len(far) * share**2 <= count else (low, share)
        of_rim = min(max(round(len(near) * low), 1, count - len(far)), len(near), count - 1)
    return even_groups(grid, near, of_rim) + even_groups(grid, far, count - of_rim)


def even_groups(grid: ImageTokens, tokens: Sequence[int], count: int) -> list[list[int]]:
    """Split `tokens` into `count` compact groups of similar size.

    A group lies in one part. Each part gets its share, which is none where it has too few tokens for one.

    Args:
        grid: where tokens are.
        tokens: any of them, holes included.
        count: in `0..len(tokens)`.
    """
    if count == len(tokens):
        return [[token] for token in tokens]
    parts: dict[int, list[int]] = {}
    places = {token: place_of(grid, token) for token in tokens}
    for token, place in places.items():
        parts.setdefault(place.part, []).append(token)
    shares = _shares([len(tokens) for tokens in parts.values()], count)
    return [
        group
        for part, share in zip(parts.values(), shares, strict=True)
        for group in _compact(places, part, share)
    ]


def middle(grid: ImageTokens, group: Sequence[int]) -> int:
    """The token of a group nearest to its centroid; the first one on a tie."""
    if len(group) == 1:
        return group[0]
    places = {token: place_of(grid, token) for token in group}
    row = sum(place.row for place in places.values()) / len(group)
    col = sum(place.col for place in places.values()) / len(group)
    return min(group, key=lambda t: (square(places[t].row - row) + square(places[t].col - col), t))


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` shared out in proportion to `sizes`, none larger than its size; the largest remainders win."""
    total = max(1, sum(sizes))
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(count * sizes[index] % total), index))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares


def _compact(places: dict[int, Place], tokens: Sequence[int], count: int) -> list[list[int]]:
    """`count` groups of tokens of one part, by halving across the longer side."""
    if count <= 1:
        return [list(tokens)] if count else []
    if count == len(tokens):
        return [[token] for token in tokens]
    rows = [places[token].row for token in tokens]
    cols = [places[token].col for token in tokens]
    lines = rows if max(rows) - min(rows) >= max(cols) - min(cols) else cols
    ordered = sorted(zip(lines, tokens, strict=True))
    order = [token for _, token in ordered]
    cut, first = _halve([line for line, _ in ordered], count)
    return _compact(places, order[:cut], first) + _compact(places, order[cut:], count - first)


def _halve(lines: Sequence[int], count: int) -> tuple[int, int]:
    """Where to cut tokens sorted by line, and how many of `count` groups go before the cut.

    Between two lines if that leaves groups of similar size on both sides, which keeps them in one piece;
    else in the middle of a line, exactly in proportion.
    """
    total = len(lines)
    borders = [index for index in range(1, total) if lines[index] != lines[index - 1]]
    for cut in sorted(borders, key=lambda index: (abs(2 * index - total), index)):
        if abs(2 * cut - total) > total / 2:
            break
        before = min(max(round(count * cut / total), 1, count - (total - cut)), cut, count - 1)
        sizes = cut / before, (total - cut) / (count - before)
        if max(sizes) <= _SIMILAR * min(sizes):
            return cut, before
    before = count // 2
    return round(total * before / count), before


def square(value: float) -> float:
    """The product, rounded alike everywhere; what the C library's pow gives may differ in the last bit."""
    return value * value
