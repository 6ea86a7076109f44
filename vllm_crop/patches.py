# SPDX-License-Identifier: Apache-2.0
"""Splitting tokens evenly into compact patches."""

from collections.abc import Sequence

from vllm_crop.geometry import Place
from vllm_crop.token_grids import ImageTokens

_SIMILAR = 1.2  # how much larger the patches on one side of a cut may be, on average


def even_patches(grid: ImageTokens, tokens: Sequence[int], count: int) -> list[list[int]]:
    """Split `tokens` into `count` compact patches of similar size.

    A patch lies in one group. Each group gets its share, which is none where it has too few tokens for one.

    Args:
        grid: where tokens are.
        tokens: any of them, holes included.
        count: in `0..len(tokens)`.
    """
    if count == len(tokens):
        return [[token] for token in tokens]
    groups: dict[int, list[int]] = {}
    places = {token: grid.place(token) for token in tokens}
    for token, place in places.items():
        groups.setdefault(place.group, []).append(token)
    shares = _shares([len(group) for group in groups.values()], count)
    return [
        patch
        for group, share in zip(groups.values(), shares, strict=True)
        for patch in _compact(places, group, share)
    ]


def middle(grid: ImageTokens, patch: Sequence[int]) -> int:
    """The token of a patch nearest to its centroid; the first one on a tie."""
    if len(patch) == 1:
        return patch[0]
    places = {token: grid.place(token) for token in patch}
    row = sum(place.row for place in places.values()) / len(patch)
    col = sum(place.col for place in places.values()) / len(patch)
    return min(patch, key=lambda t: ((places[t].row - row) ** 2 + (places[t].col - col) ** 2, t))


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` shared out in proportion to `sizes`, none larger than its size; the largest remainders win."""
    total = max(1, sum(sizes))
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(count * sizes[index] % total), index))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares


def _compact(places: dict[int, Place], tokens: Sequence[int], count: int) -> list[list[int]]:
    """`count` patches of tokens of one group, by halving across the longer side."""
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
    """Where to cut tokens sorted by line, and how many of `count` patches go before the cut.

    Between two lines if that leaves patches of similar size on both sides, which keeps them in one piece;
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
