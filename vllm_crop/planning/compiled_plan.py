# SPDX-License-Identifier: Apache-2.0
"""The rules of `vllm_crop.planning.plan` and `groups`, compiled: what a server plans with.

Over arrays a plan of 24 x 24 tokens is more than a hundred calls of numpy on hardly any data, which hold the
GIL of a process that has other requests to serve, and find none of their code in the processor's caches when
a request comes. Compiled, the same rules are loops over tokens and one call: they take a fraction of the time
and let other threads run. numba compiles it; vLLM brings that along.

Importing this module imports numba and compiles, or loads what was compiled before, which takes longer than
thousands of plans. `vllm_crop.planning.plan.use_compiled` does it once.
"""

from typing import Any

import numba
import numpy as np
from llvmlite.binding import ffi
from numpy.typing import NDArray

from vllm_crop.planning.geometry import Places
from vllm_crop.planning.groups import SIMILAR

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# vLLM's CPU worker asks every object in every module for its `__dict__` (vllm/triton_utils/dispatcher.py) and
# fails at start on llvmlite's handle of LLVM, which answers any name with a function, and keeps its answers.
ffi.lib._fntab["__dict__"] = {}

FAR, INSIDE, RIM, LEFT_OUT = 0, 1, 2, 3  # zones, as of `vllm_crop.planning.plan.Zones`

# Places of a picture are kept and must not be written to.
_KEPT = "Array(int32, 1, 'C', readonly=True)"
_PLAN = (
    f"int64({_KEPT}, {_KEPT}, {_KEPT}, uint8[::1], boolean, int64[::1], int32[::1], float64, int32, "
    "int32[::1], int32[::1], int32[::1])"
)
# Sets that wait while one is cut: of each depth one. The larger part of a cut is 3/4 of a set or less, so the
# 2 ** 31 tokens that fit into int32 are at most 75 deep.
_MAX_DEPTH = 128


def plan(
    places: Places,
    zones: NDArray[np.uint8],
    pools: bool,
    counts: tuple[int, ...],
    eviction_layers: tuple[int, ...],
    never: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Make a plan as `vllm_crop.planning.plan` does over arrays.

    Args:
        zones: of each token its zone, `[num_tokens]`.
        pools: whether embeddings are means; else all are single tokens.
        counts: of embeddings before the first eviction, then from each on.
        eviction_layers: ascending, as many as there are evictions.
        never: what stands for no eviction layer.

    Returns:
        `assignment`, `position` and `evicted_from_layer` of a TokenPlan.
    """
    assignment = np.empty(len(zones), dtype=np.int32)
    position, leaves_at = np.empty(counts[0], dtype=np.int32), np.empty(counts[0], dtype=np.int32)
    num_embeddings = _plan(
        *(places.part, places.row, places.col, zones, pools),
        *(np.array(counts, dtype=np.int64), np.array(eviction_layers, dtype=np.int32)),
        *(SIMILAR, never, assignment, position, leaves_at),
    )
    if num_embeddings < counts[0]:
        return assignment, position[:num_embeddings].copy(), leaves_at[:num_embeddings].copy()
    return assignment, position, leaves_at


@numba.njit(nogil=True)
def _all_middles(row, col, tokens, sizes, found):  # type: ignore[no-untyped-def]
    """Fill `found` with the token of each group nearest to its centroid."""
    start = 0
    for index in range(len(sizes)):
        end = start + sizes[index]
        rows = cols = 0
        for place in range(start, end):
            rows += row[tokens[place]]
            cols += col[tokens[place]]
        middle_row, middle_col = rows / sizes[index], cols / sizes[index]
        nearest, best = -1, 0.0
        for place in range(start, end):
            token = tokens[place]
            down, right = row[token] - middle_row, col[token] - middle_col
            distance = down * down + right * right
            if nearest < 0 or distance < best or (distance == best and token < nearest):
                nearest, best = token, distance
        found[index] = nearest
        start = end


@numba.njit(nogil=True)
def _split(row, col, totals, counts, similar, order, sizes):  # type: ignore[no-untyped-def]
    """Split sets of tokens; as groups._split.

    Fills `order` with indices of tokens group by group, and `sizes` with those of the groups.

    `similar` is an argument since numba's cache would not notice that a constant of another file has changed.
    """
    by_row = np.arange(len(row))
    by_col = np.empty_like(by_row)
    aside = np.empty_like(by_row)
    after_cut = np.empty(len(row), dtype=np.bool_)
    waiting = np.empty((_MAX_DEPTH, 3), dtype=np.int64)
    num_ordered = num_patches = first = 0
    for index in range(len(totals)):
        # A stable sort by column: counted, then dealt out.
        end = first + totals[index]
        places = np.zeros(col[first:end].max() + 2, dtype=np.int64)
        for token in range(first, end):
            places[col[token] + 1] += 1
        for column in range(1, len(places)):
            places[column] += places[column - 1]
        for token in range(first, end):
            by_col[first + places[col[token]]] = token
            places[col[token]] += 1
        waiting[0, 0], waiting[0, 1], waiting[0, 2] = first, totals[index], counts[index]
        num_waiting = 1
        first = end
        while num_waiting:
            num_waiting -= 1
            start, total, count = waiting[num_waiting]
            if count in (1, total):  # one group, or groups of one token
                for offset in range(total):
                    order[num_ordered + offset] = by_row[start + offset]
                num_ordered += total
                for offset in range(count):
                    sizes[num_patches + offset] = total // count
                num_patches += count
                continue
            last = start + total - 1
            height = row[by_row[last]] - row[by_row[start]]
            width = col[by_col[last]] - col[by_col[start]]
            if height >= width:
                along, lines, across = by_row, row, by_col
            else:
                along, lines, across = by_col, col, by_row
            # Between two lines, from the middle outwards, or exactly in proportion in the middle of a line.
            before = count // 2
            cut = int(np.rint(total * before / count))
            low, high = total // 2, total // 2 + 1
            while low > 0 or high < total:
                if low > 0 and total - 2 * low <= 2 * high - total:
                    at, low = low, low - 1
                else:
                    at, high = high, high + 1
                if 2 * abs(2 * at - total) > total:
                    break
                if lines[along[start + at]] == lines[along[start + at - 1]]:
                    continue
                share = min(max(int(np.rint(count * at / total)), 1, count - (total - at)), at, count - 1)
                one, other = at / share, (total - at) / (count - share)
                if max(one, other) <= similar * min(one, other):
                    cut, before = at, share
                    break
            # The other order is divided by the same cut, and both parts stay sorted.
            for offset in range(total):
                after_cut[along[start + offset]] = offset >= cut
            num_before = num_after = 0
            for offset in range(total):
                token = across[start + offset]
                if after_cut[token]:
                    aside[num_after] = token
                    num_after += 1
                else:
                    across[start + num_before] = token
                    num_before += 1
            for offset in range(num_after):
                across[start + cut + offset] = aside[offset]
            half = waiting[num_waiting]
            half[0], half[1], half[2] = start + cut, total - cut, count - before
            half = waiting[num_waiting + 1]
            half[0], half[1], half[2] = start, cut, before
            num_waiting += 2


@numba.njit(nogil=True)
def _shares(sizes, count, shares):  # type: ignore[no-untyped-def]
    """Fill `shares`; as groups._shares."""
    total = max(1, sizes.sum())
    given = 0
    for index in range(len(sizes)):
        shares[index] = count * sizes[index] // total
        given += shares[index]
    taken = np.zeros(len(sizes), dtype=np.bool_)
    for _ in range(count - given):  # the largest remainders, of equal ones the first
        best = -1
        for index in range(len(sizes)):
            if taken[index]:
                continue
            if best < 0 or count * sizes[index] % total > count * sizes[best] % total:
                best = index
        taken[best] = True
        shares[best] += 1


@numba.njit(nogil=True)
def _even_groups(part, row, col, tokens, count, similar):  # type: ignore[no-untyped-def]
    """Tokens group by group and the groups' sizes; as groups.even_groups."""
    if count == len(tokens):
        return tokens, np.ones(count, dtype=np.int64)
    if not count:
        return tokens[:0], tokens[:0]
    num_parts = part[-1] + 1
    sizes = np.zeros(num_parts, dtype=np.int64)
    for token in tokens:
        sizes[part[token]] += 1
    # Parts in the order in which the prompt comes to them.
    in_prompt = np.empty(num_parts, dtype=np.int64)
    known = np.zeros(num_parts, dtype=np.bool_)
    num_known = 0
    for token in tokens:
        if not known[part[token]]:
            known[part[token]] = True
            in_prompt[num_known] = part[token]
            num_known += 1
    shares, shares_of = np.zeros(num_known, dtype=np.int64), np.zeros(num_parts, dtype=np.int64)
    _shares(sizes[in_prompt[:num_known]], count, shares)
    for index in range(num_known):
        shares_of[in_prompt[index]] = shares[index]
    # Part by part; those without a share are left out.
    wanted = np.empty(len(tokens), dtype=np.int64)
    totals, counts = np.empty(num_known, dtype=np.int64), np.empty(num_known, dtype=np.int64)
    num_wanted = num_sets = 0
    for one in range(num_parts):
        if not shares_of[one]:
            continue
        totals[num_sets], counts[num_sets] = sizes[one], shares_of[one]
        num_sets += 1
        for token in tokens:
            if part[token] == one:
                wanted[num_wanted] = token
                num_wanted += 1
    wanted = wanted[:num_wanted]
    order, found = np.empty(num_wanted, dtype=np.int64), np.empty(count, dtype=np.int64)
    _split(row[wanted], col[wanted], totals[:num_sets], counts[:num_sets], similar, order, found)
    return wanted[order], found


@numba.njit(nogil=True)
def _rim_count(num_rim, num_far, count):  # type: ignore[no-untyped-def]
    """As budget.rim_count."""
    if not num_rim or not num_far:
        return count if num_rim else 0
    share = (np.sqrt(num_rim * num_rim + 4.0 * num_far * count) - num_rim) / (2 * num_far)
    return max(min(int(np.rint(num_rim * share)), num_rim, count - 1), count - num_far, 1)


@numba.njit(nogil=True)
def _context(part, row, col, zones, tokens, count, similar):  # type: ignore[no-untyped-def]
    """Groups of tokens outside the region; as plan._context."""
    if count < 2:
        return _even_groups(part, row, col, tokens, count, similar)
    rim = tokens[zones[tokens] == RIM]
    far = tokens[zones[tokens] != RIM]
    of_rim = _rim_count(len(rim), len(far), count)
    near, near_sizes = _even_groups(part, row, col, rim, of_rim, similar)
    distant, distant_sizes = _even_groups(part, row, col, far, count - of_rim, similar)
    return np.concatenate((near, distant)), np.concatenate((near_sizes, distant_sizes))


@numba.njit(nogil=True)
def _middles(row, col, tokens, sizes):  # type: ignore[no-untyped-def]
    """As groups.middles."""
    if len(tokens) == len(sizes):
        return tokens
    found = np.empty(len(sizes), dtype=np.int64)
    _all_middles(row, col, tokens, sizes, found)
    return found


@numba.njit(nogil=True)
def _region_first(part, row, col, zones, tokens, count, similar):  # type: ignore[no-untyped-def]
    """`count` of the tokens, ascending; as plan._region_first."""
    region = tokens[zones[tokens] == INSIDE]
    kept = np.zeros(len(zones), dtype=np.bool_)
    if len(region) >= count:
        kept[_middles(row, col, *_even_groups(part, row, col, region, count, similar))] = True
    else:
        kept[region] = True
        others = tokens[zones[tokens] != INSIDE]
        groups = _context(part, row, col, zones, others, count - len(region), similar)
        kept[_middles(row, col, *groups)] = True
    return kept.nonzero()[0]


def _whole_plan(  # type: ignore[no-untyped-def]
    part, row, col, zones, pools, counts, layers, similar, never, assignment, position, leaves_at
):
    """Fill the last three, and return how many embeddings there are; as plan._plan_counts."""
    tokens = (zones != LEFT_OUT).nonzero()[0]
    count = min(counts[0], len(tokens))
    assignment[:] = -1
    if not pools or (zones == INSIDE).sum() >= count:
        kept = _region_first(part, row, col, zones, tokens, count, similar)
        assignment[kept] = np.arange(count)
    else:
        region, others = tokens[zones[tokens] == INSIDE], tokens[zones[tokens] != INSIDE]
        grouped, sizes = _context(part, row, col, zones, others, count - len(region), similar)
        middle = _middles(row, col, grouped, sizes)
        kept = np.sort(np.concatenate((region, middle)))
        assignment[kept] = np.arange(count)
        start = 0
        for index in range(len(sizes)):
            assignment[grouped[start : start + sizes[index]]] = assignment[middle[index]]
            start += sizes[index]
    position[:count] = kept
    leaves = np.full(len(zones), never, dtype=np.int32)
    left = kept
    for stage in range(min(len(layers), len(counts) - 1)):
        leaves[left] = layers[stage]
        left = _region_first(part, row, col, zones, left, min(counts[stage + 1], len(left)), similar)
        leaves[left] = never
    leaves_at[:count] = leaves[kept]
    return count


def _compiled(cache: bool) -> Any:
    # The signature makes numba compile now; no request waits for it.
    return numba.njit(_PLAN, nogil=True, cache=cache)(_whole_plan)


try:
    _plan = _compiled(cache=True)
except RuntimeError:  # no folder that numba can write to
    _plan = _compiled(cache=False)
