# SPDX-License-Identifier: Apache-2.0
"""The loops of `vllm_crop.planning.groups`, compiled: what a server plans with.

Over arrays a plan of 24 x 24 tokens is a few dozen calls of numpy on hardly any data, which hold the GIL of a
process that has other requests to serve. Compiled, the same rules are loops over tokens: they take a fraction
of the time and let other threads run. numba compiles it; vLLM brings that along.

Importing this module imports numba and compiles, or loads what was compiled before, which takes longer than
thousands of plans. `vllm_crop.planning.groups.use_compiled` does it once.
"""

from typing import Any

import numba
import numpy as np
from llvmlite.binding import ffi
from numpy.typing import NDArray

from vllm_crop.planning.geometry import Indices
from vllm_crop.planning.groups import SIMILAR

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# vLLM's CPU worker asks every object in every module for its `__dict__` (vllm/triton_utils/dispatcher.py) and
# fails at start on llvmlite's handle of LLVM, which answers any name with a function, and keeps its answers.
ffi.lib._fntab["__dict__"] = {}

_SPLIT = "void(int32[::1], int32[::1], int64[::1], int64[::1], float64, int64[::1], int64[::1])"
# Places of a picture are kept and must not be written to.
_KEPT = "Array(int32, 1, 'C', readonly=True)"
_MIDDLES = f"void({_KEPT}, {_KEPT}, int64[::1], int64[::1], int64[::1])"
# Sets that wait while one is cut: of each depth one. The larger part of a cut is 3/4 of a set or less, so the
# 2 ** 31 tokens that fit into int32 are at most 75 deep.
_MAX_DEPTH = 128


def split(
    row: NDArray[np.int32], col: NDArray[np.int32], totals: Indices, counts: Indices
) -> tuple[Indices, Indices]:
    """Split sets of tokens as `vllm_crop.planning.groups` does over arrays.

    Args:
        row, col: where each token is, `[num_tokens]`, set by set and row by row within each.
        totals: tokens of each set.
        counts: groups of each set, at least 1 and at most its tokens.

    Returns:
        Indices of tokens group by group, and the groups' sizes, in no particular order.
    """
    order, sizes = np.empty(len(row), dtype=np.int64), np.empty(sum(counts.tolist()), dtype=np.int64)
    _split(row, col, totals, counts, SIMILAR, order, sizes)
    return order, sizes


def middles(row: NDArray[np.int32], col: NDArray[np.int32], tokens: Indices, sizes: Indices) -> Indices:
    """Find the token of each group nearest to its centroid as `vllm_crop.planning.groups` does.

    Args:
        row, col: where each token of the image is, `[num_image_tokens]`.
        tokens, sizes: the groups.
    """
    found = np.empty(len(sizes), dtype=np.int64)
    _middles(row, col, tokens, sizes, found)
    return found


def _all_middles(row, col, tokens, sizes, found):  # type: ignore[no-untyped-def]
    """Fill `found`; as `middles`, in what numba can compile."""
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


def _split_all(row, col, totals, counts, similar, order, sizes):  # type: ignore[no-untyped-def]
    """Fill `order` and `sizes`; as `split`, in what numba can compile.

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


def _compiled(cache: bool) -> tuple[Any, Any]:
    # The signatures make numba compile now; no request waits for it.
    def compiled(signature: str, function: Any) -> Any:
        return numba.njit(signature, nogil=True, cache=cache)(function)

    return compiled(_SPLIT, _split_all), compiled(_MIDDLES, _all_middles)


try:
    _split, _middles = _compiled(cache=True)
except RuntimeError:  # no folder that numba can write to
    _split, _middles = _compiled(cache=False)
