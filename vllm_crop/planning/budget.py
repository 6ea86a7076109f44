# SPDX-License-Identifier: Apache-2.0
"""The budget: how many embeddings of an image each decoder layer runs with.

A `pruning_rate` is averaged over layers, so the layers before the first eviction pay for their many tokens
with fewer tokens later.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from operator import mul
from typing import Literal

from vllm_crop.errors import CropError

Method = Literal["plc", "ilp", "plc+ilp", "off"]

_TOLERANCE = 0.5  # tokens per layer by which whole numbers may miss the average asked for
_BISECTIONS = 60  # halve [0, 1] down to the precision of a float


class BudgetError(CropError):
    """No whole numbers of tokens meet the pruning rate with these eviction layers.

    Attributes:
        least: tokens on average over layers that can be met; None where nothing can.
    """

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


def method_evicts(method: Method) -> bool:
    """Whether a method takes embeddings away between decoder layers."""
    return method in ("ilp", "plc+ilp")


def target_average(num_tokens: int, pruning_rate: float) -> float:
    """Tokens per layer that are left of `num_tokens` at `pruning_rate` in [0, 1); at least one."""
    return max(1.0, num_tokens * (1 - pruning_rate))


def retained_count(num_tokens: int, pruning_rate: float) -> int:
    """Embeddings left of `num_tokens` when the fraction `pruning_rate` in [0, 1) is removed; at least one."""
    return round(target_average(num_tokens, pruning_rate))


def check_eviction_layers(eviction_layers: Sequence[int], num_layers: int, first: int = 1) -> None:
    """Check that a model of `num_layers` decoder layers can evict at these.

    Args:
        first: the first layer that can run with fewer visual tokens.

    Raises:
        BudgetError: none, not strictly ascending, or outside first..num_layers-1.
    """
    bounds = [first - 1, *eviction_layers, num_layers]
    if not eviction_layers or any(one >= other for one, other in pairwise(bounds)):
        needed = "" if first == 1 else f" and adds visual features after each of the first {first}"
        raise BudgetError(
            f"eviction_layers must be ascending layers from {first} to {num_layers - 1}, as the model has "
            f"{num_layers} decoder layers{needed}, got {list(eviction_layers)}"
        )


@lru_cache(maxsize=256)  # a server prunes most pictures at one rate, and many are of one size
def retained_per_stage(
    num_tokens: int, pruning_rate: float, method: Method, num_layers: int, eviction_layers: tuple[int, ...]
) -> tuple[int, ...]:
    """How many embeddings are left before the first eviction, and from each eviction layer on.

    Every stage keeps the same fraction of what the stage before it kept (PyramidDrop's schedule); compression
    counts as the first stage of "plc+ilp". The average over layers is within half a token of the target.

    Args:
        num_tokens: visual tokens of the image, at least 1.
        pruning_rate: fraction of (token, layer) pairs to remove, in [0, 1).
        method: without eviction there is one entry.
        num_layers: decoder layers of the language model.
        eviction_layers: strictly ascending, in 1..num_layers-1.

    Returns:
        Counts that never increase, each at least 1: entry 0 for the layers below `eviction_layers[0]`,
        entry `s` for those from `eviction_layers[s - 1]` on.

    Raises:
        BudgetError: the layers are wrong, or those before the first eviction take more than the budget.
    """
    if method == "off":
        return (num_tokens,)
    if not method_evicts(method):
        return (retained_count(num_tokens, pruning_rate),)
    check_eviction_layers(eviction_layers, num_layers)
    target = target_average(num_tokens, pruning_rate)
    if method == "ilp" and _least_average(num_tokens, num_layers, eviction_layers[0]) > target + _TOLERANCE:
        raise _budget_error(num_tokens, pruning_rate, num_layers, eviction_layers[0])

    bounds = [0, *eviction_layers, num_layers]
    widths = [end - start for start, end in pairwise(bounds)]
    stages = range(len(widths)) if method == "ilp" else range(1, len(widths) + 1)

    def sizes(fraction: float) -> list[float]:
        return [max(1.0, num_tokens * fraction**stage) for stage in stages]

    def rounded(sizes: list[float]) -> tuple[int, ...]:
        return tuple(map(round, sizes))

    low, high = 0.0, 1.0
    for bisection in range(_BISECTIONS):
        middle = (low + high) / 2
        total = sum(map(mul, widths, sizes(middle)))
        low, high = (middle, high) if total <= target * num_layers else (low, middle)
        # Mostly both ends come to the same whole numbers long before they meet.
        if bisection % 6 == 5 and (counts := rounded(sizes(high))) == rounded(sizes(low)):
            return counts
    # Each is at most half a token off, and so is their average.
    return rounded(sizes(high))


def rim_count(num_rim: int, num_far: int, count: int) -> int:
    """How many of a context's embeddings its rim gets, the tokens next to the region.

    A token of the region has an embedding of its own, one far from it a fraction of one. One of the rim has
    the geometric mean of both: with s * s of an embedding for a far token and s for one of the rim,
    `num_rim * s + num_far * s * s = count`.

    Args:
        num_rim, num_far: tokens.
        count: embeddings for both, in `2..num_rim + num_far`.
    """
    if not num_rim or not num_far:
        return count if num_rim else 0
    share = (math.sqrt(num_rim * num_rim + 4 * num_far * count) - num_rim) / (2 * num_far)
    # Neither is left out altogether where there are two for them.
    return max(min(round(num_rim * share), num_rim, count - 1), count - num_far, 1)


def _least_average(num_tokens: int, num_layers: int, first_layer: int) -> float:
    """Tokens per layer if all are seen below `first_layer` and a single one from there on."""
    return (first_layer * num_tokens + num_layers - first_layer) / num_layers


def _budget_error(num_tokens: int, pruning_rate: float, num_layers: int, first_layer: int) -> BudgetError:
    def fits(rate: float, first: int) -> bool:
        least = _least_average(num_tokens, num_layers, first)
        return least <= target_average(num_tokens, rate) + _TOLERANCE

    target = target_average(num_tokens, pruning_rate)
    least = _least_average(num_tokens, num_layers, first_layer)
    latest = max((first for first in range(1, first_layer) if fits(pruning_rate, first)), default=None)
    highest = max(rate for rate in (step / 1000 for step in range(1000)) if fits(rate, first_layer))
    layers = f"eviction_layers that begin at layer {latest} or earlier, or " if latest else ""
    return BudgetError(
        f"{pruning_rate:g} leaves {target:.1f} of {num_tokens} tokens per layer, but method 'ilp' with "
        f"eviction from layer {first_layer} of {num_layers} takes at least {least:.1f}: needs {layers}"
        f"a pruning_rate of at most {highest:g}",
        next(count for count in range(1, num_tokens + 1) if fits(1 - count / num_tokens, first_layer)),
    )
