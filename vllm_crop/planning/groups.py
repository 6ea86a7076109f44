# SPDX-License-Identifier: Apache-2.0
"""Splitting tokens evenly into compact groups.

A set of tokens that is to become `count` groups is cut in two across its longer side, each half gets its
share of them, and is cut again. Sets of the same depth do not depend on each other, so all of them are cut at
once: a plan of thousands of groups takes a dozen steps over arrays and not thousands of calls.

A server does without these steps: `vllm_crop.planning.plan.use_compiled`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_crop.planning.geometry import Indices, Places

SIMILAR = 1.2  # how much larger the groups on one side of a cut may be, on average

# How the cuts of many sets are found quickest depends on how many and how large they are.
_FEW_SETS = 8  # up to so many, one after the other
_SMALL_BITS, _LARGE_BITS = 6, 20  # sets of fewer than 2 ** 6 tokens in a table, larger ones by computing
_LONG = 4000  # tokens from which counting is quicker than sorting

_NO_SET = int(np.iinfo(np.uint16).max)
_NO_CUT = int(np.iinfo(np.int32).max)


class Groups(NamedTuple):
    """Tokens by group.

    Attributes:
        tokens: `[num_tokens]`, group by group, in any order within each.
        sizes: how many of them each group has, `[num_patches]`, at least 1.
    """

    tokens: Indices
    sizes: Indices


def even_groups(places: Places, tokens: Indices, count: int) -> Groups:
    """Split tokens into compact groups of similar size.

    A group lies in one part. Each part gets its share, which is none where it has too few tokens for one.

    Args:
        places: where the image's tokens are.
        tokens: any of them, ascending, holes included.
        count: how many groups, in `0..len(tokens)`.
    """
    if count == len(tokens):
        return Groups(tokens, np.ones(count, dtype=np.int64))
    if not count:
        return Groups(tokens[:0], tokens[:0])
    if places.part[-1]:
        tokens, totals, counts = _by_part(places.part, tokens, count)
        wanted = counts > 0
        if not wanted.all():
            tokens, totals, counts = tokens[wanted.repeat(totals)], totals[wanted], counts[wanted]
    else:  # all are of the first part
        totals, counts = np.array([len(tokens)]), np.array([count])
    order, sizes = _split(places.row[tokens], places.col[tokens], totals, counts)
    return Groups(tokens[order], sizes)


def middles(places: Places, groups: Groups) -> Indices:
    """Find the token of each group nearest to its centroid, the first one on a tie, `[num_patches]`."""
    tokens, sizes = groups
    if len(tokens) == len(sizes):
        return tokens
    starts = sizes.cumsum() - sizes
    distances = np.zeros(len(tokens))
    for axis in (places.row[tokens], places.col[tokens]):
        centroid = np.add.reduceat(axis, starts, dtype=np.int64) / sizes
        offset = axis - centroid.repeat(sizes)
        distances += offset * offset
    nearest = distances == np.minimum.reduceat(distances, starts).repeat(sizes)
    found: Indices = np.minimum.reduceat(np.where(nearest, tokens, len(places.row)), starts)
    return found


def _by_part(part: NDArray[np.int32], tokens: Indices, count: int) -> tuple[Indices, Indices, Indices]:
    """Tokens sorted by part, and the size and the share of each part among them."""
    own = part[tokens]
    tokens = tokens[own.argsort(kind="stable")]
    sizes = np.bincount(own)
    sizes = sizes[sizes > 0]
    # Of equal remainders the part wins that comes first in the prompt.
    in_prompt = tokens[sizes.cumsum() - sizes].argsort()
    shares = np.empty_like(sizes)
    shares[in_prompt] = _shares(sizes[in_prompt].tolist(), count)
    return tokens, sizes, shares


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` shared out in proportion to `sizes`, none larger than its size; the largest remainders win."""
    total = max(1, sum(sizes))
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(count * sizes[index] % total), index))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares


class _Codes:
    """Tokens in two orders: row by row, and column by column.

    Sets lie one after another. The tokens of a set that is cut between rows are sorted row by row, those of
    one that is cut between columns column by column. A token's code is its rank in the order its set wants:
    below m, the number of tokens, for the one, from m on for the other. So codes sort as their set wants it,
    and tables of 2 m entries say what a code stands for.

        tokens   0 1 2      code row by row    0 1 2      column by column   m   m+2 m+4
                 3 4 5                         3 4 5                         m+1 m+3 m+5
    """

    def __init__(self, row: NDArray[np.int32], col: NDArray[np.int32], totals: Indices) -> None:
        """`row`, `col`: where the tokens are, row by row within each set; `totals`: tokens of each set."""
        self.num_tokens = num_tokens = len(row)
        width = int(col.max()) + 1
        column = np.arange(len(totals)).repeat(totals) * width + col if len(totals) > 1 else col
        small = len(totals) * width <= 1 << 16
        by_column = column.astype(np.uint16 if small else np.int64).argsort(kind="stable")
        codes = np.arange(2 * num_tokens)
        self.first = codes[:num_tokens]
        self.token = np.concatenate([self.first, by_column])
        self.row, self.col = row[self.token], col[self.token]
        self.line = np.concatenate([self.row[:num_tokens], self.col[num_tokens:]])
        self._in_order = np.concatenate([self.token, np.empty_like(codes)])
        column_codes = self._in_order[2 * num_tokens :]
        column_codes[by_column] = codes[num_tokens:]
        column_codes[num_tokens:] = codes[num_tokens:]

    def sort(self, codes: Indices, set_of: Indices, by_column: NDArray[np.bool_]) -> Indices:
        """Put each set's tokens in the order it wants.

        Args:
            codes: of tokens set by set.
            set_of: the index of their set.
            by_column: which order each set wants.
        """
        size = 2 * self.num_tokens
        codes = self._in_order.take(codes + (by_column * size).take(set_of))
        if len(codes) < _LONG or len(by_column) > _NO_SET:
            keys = set_of * size
            codes = codes + keys
            codes.sort()  # by set, then by code; sets keep their places
            codes -= keys
            return codes
        holder = np.full(size, _NO_SET, dtype=np.uint16)
        holder[codes] = set_of
        codes = (holder != _NO_SET).nonzero()[0]
        by_set: Indices = codes.take(holder.take(codes).argsort(kind="stable"))
        return by_set


def _split(
    row: NDArray[np.int32], col: NDArray[np.int32], totals: Indices, counts: Indices
) -> tuple[Indices, Indices]:
    """Split sets of tokens, each into its count of groups.

    One step of the loop, with two sets of 6 and 3 tokens that are to be 3 and 2 groups:

        sets      |a b c d e f|g h i|      in the order of the side they are cut across
        lines      0 0 1 1 2 2 0 0 1       that side's line of each token
        cuts           ^           ^       at a border between lines, if one leaves similar groups
        next      |a b|c d e f|g h|i|      twice the sets, with 1, 2, 1 and 1 groups to become
        done      |a b|       |g h|i|      leave the loop

    Args:
        row, col: where each token is, `[num_tokens]`, set by set and row by row within each.
        totals: tokens of each set.
        counts: groups of each set, at least 1 and at most its tokens.

    Returns:
        Indices of tokens group by group, and the groups' sizes, in no particular order.
    """
    done: list[tuple[Indices, Indices]] = []
    of = _Codes(row, col, totals)
    codes = of.first
    while True:
        open_sets = (counts > 1) & (counts < totals)
        if np.count_nonzero(open_sets) < len(totals):
            is_open = open_sets.repeat(totals)
            closed, into = totals[~open_sets], counts[~open_sets]  # one group, or groups of one token
            done.append((codes[~is_open], (closed // into).repeat(into)))
            codes, totals, counts = codes[is_open], totals[open_sets], counts[open_sets]
            if not len(totals):
                break
        starts = totals.cumsum() - totals
        set_of = np.arange(len(totals)).repeat(totals)
        height, width = (_extents(axis.take(codes), starts) for axis in (of.row, of.col))
        codes = of.sort(codes, set_of, width > height)
        line = of.line.take(codes)
        cuts, before = _cuts(line[1:] != line[:-1], set_of, starts, totals, counts)
        totals, counts = _halves(cuts, totals), _halves(before, counts)
    codes, sizes = (np.concatenate(parts) for parts in zip(*done, strict=True))
    return of.token[codes], sizes


def _halves(first: Indices, of: Indices) -> Indices:
    """The first part of each number and the rest of it, one after the other."""
    halves = np.empty((len(of), 2), dtype=np.int64)
    halves[:, 0] = first
    np.subtract(of, first, out=halves[:, 1])
    return halves.reshape(-1)


def _extents(lines: NDArray[np.int32], starts: Indices) -> NDArray[np.int32]:
    """How far each set reaches, in lines."""
    extents: NDArray[np.int32] = np.maximum.reduceat(lines, starts) - np.minimum.reduceat(lines, starts)
    return extents


def _cuts(
    changes: NDArray[np.bool_], set_of: Indices, starts: Indices, totals: Indices, counts: Indices
) -> tuple[Indices, Indices]:
    """Where to cut each set, in tokens from its start, and how many of its groups go before the cut.

    Between two lines if that leaves groups of similar size on both sides, which keeps them in one piece;
    else in the middle of a line, exactly in proportion.

    Args:
        changes: whether the line after a token, sorted as its set wants it, is another one.
        set_of: of each token its set; `starts`, `totals`, `counts` are about these.
    """
    if len(totals) <= _FEW_SETS:
        borders = (changes.nonzero()[0] + 1).tolist()
        sets = zip(starts.tolist(), totals.tolist(), counts.tolist(), strict=True)
        cuts = np.array([_cut(borders, *one) for one in sets])
        return cuts[:, 0], cuts[:, 1]
    if totals.max() < 1 << _SMALL_BITS:
        table = _small_sets()
        rows = (((totals << _SMALL_BITS) + counts) << _SMALL_BITS) - starts
        rated = table.take(rows.take(set_of) + np.arange(len(set_of)))
        rated[1:][~changes] = _NO_CUT
        return _unpack(np.minimum.reduceat(rated, starts).astype(np.int64), _SMALL_BITS)
    borders = changes.nonzero()[0] + 1
    of = set_of.take(borders)
    cut, total = borders - starts.take(of), totals.take(of)
    central = (2 * abs(2 * cut - total) <= total).nonzero()[0]  # the others are no good
    of = of.take(central)
    best = _rate(totals, counts, np.zeros_like(totals), _LARGE_BITS)
    np.minimum.at(best, of, _rate(total.take(central), counts.take(of), cut.take(central), _LARGE_BITS))
    return _unpack(best, _LARGE_BITS)


def _cut(borders: Sequence[int], start: int, total: int, count: int) -> tuple[int, int]:
    """Where to cut one set and how many of its groups go before the cut: the rule.

    Args:
        borders: tokens before which a line begins, ascending; of all sets.
        start: the set's first token; `total` of them are to be `count` groups.
    """
    after = bisect_left(borders, start + (total + 1) // 2)
    before = after - 1
    while True:  # from the middle outwards
        left, right = borders[before] - start if before >= 0 else 0, total
        if after < len(borders):
            right = borders[after] - start
        if total - 2 * left <= 2 * right - total:
            cut, before = left, before - 1
        else:
            cut, after = right, after + 1
        if 2 * abs(2 * cut - total) > total:
            break
        share = min(max(round(count * cut / total), 1, count - (total - cut)), cut, count - 1)
        sizes = cut / share, (total - cut) / (count - share)
        if max(sizes) <= SIMILAR * min(sizes):
            return cut, share
    share = count // 2
    return round(total * share / count), share


# The same rule for many cuts at once. A cut is one number, the better the smaller: its distance from the
# middle, then where it is, then how many groups go before it, in fields of some bits.


def _rate(total: Indices, count: Indices, cut: Indices, bits: int) -> Indices:
    """Rate cuts between lines; one that will not do, such as at 0, becomes the cut in the middle of a line.

    Args:
        total: tokens of a set; `count`: groups of it; `cut`: tokens before a cut. They broadcast.
        bits: of a field.
    """
    rest = total - cut
    share: Indices = np.rint(count * cut / total).astype(np.int64)
    share = np.maximum(np.minimum(share, np.minimum(cut, count - 1)), np.maximum(1, count - rest))
    one, other = cut / share, rest / (count - share)
    distance: Indices = np.abs(cut - rest)
    similar = np.maximum(one, other) <= SIMILAR * np.minimum(one, other)
    rated = _pack(2 * distance + (cut > rest), cut, share, bits)
    half = count // 2
    middle = np.rint(total * half / count).astype(np.int64)
    return np.where(similar & (2 * distance <= total), rated, _pack(2 << bits, middle, half, bits))


def _pack(distance: Indices | int, cut: Indices, share: Indices, bits: int) -> Indices:
    return (((distance << bits) + cut) << bits) + share


def _unpack(rated: Indices, bits: int) -> tuple[Indices, Indices]:
    """Where to cut, and the groups before it."""
    field = (1 << bits) - 1
    return rated >> bits & field, rated & field


@cache
def _small_sets() -> NDArray[np.int32]:
    """The rating of every cut of every small set, by total, count and cut; 1 MiB."""
    total, count, cut = np.indices((1 << _SMALL_BITS,) * 3)
    possible = (count > 1) & (count < total) & (cut < total)
    rated = np.zeros(possible.shape, dtype=np.int32)
    rated[possible] = _rate(total[possible], count[possible], cut[possible], _SMALL_BITS)
    return rated.reshape(-1)
