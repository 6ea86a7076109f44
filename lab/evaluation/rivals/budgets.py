# SPDX-License-Identifier: Apache-2.0
"""The same budget for every rival: tokens averaged over layers, as planning/budget.py counts them."""

from collections.abc import Sequence

from vllm_crop.planning.budget import retained_per_stage, target_average

_BISECTIONS = 60  # halve an interval of counts down to the precision of a float


def stages(num_tokens: int, rate: float, num_layers: int, layers: tuple[int, ...]) -> dict[int, int]:
    """Tokens left from each layer on; every stage keeps the same fraction.

    Raises:
        BudgetError: the layers before the first stage take more than the rate leaves.
    """
    _, *left = retained_per_stage(num_tokens, rate, "ilp", num_layers, layers)
    return dict(zip(layers, left, strict=True))


def scaled(
    num_tokens: int, rate: float, num_layers: int, layers: tuple[int, ...], proportions: Sequence[float]
) -> dict[int, int]:
    """Tokens left from each layer on, in given proportions; how many is solved for the budget.

    Raises:
        BudgetError: the layers before the first stage take more than the rate leaves.
    """
    retained_per_stage(num_tokens, rate, "ilp", num_layers, layers)  # raises
    ends = [*layers[1:], num_layers]
    widths = [end - start for start, end in zip(layers, ends, strict=True)]
    wanted = target_average(num_tokens, rate) * num_layers - num_tokens * layers[0]
    return dict(zip(layers, _solved(num_tokens, wanted, widths, proportions), strict=True))


def _solved(num_tokens: int, wanted: float, widths: Sequence[int], proportions: Sequence[float]) -> list[int]:
    """A count for each width, in given proportions, that take so many tokens in all layers together."""

    def counts(scale: float) -> list[float]:
        return [min(float(num_tokens), max(1.0, scale * part)) for part in proportions]

    low, high = 0.0, num_tokens / min(proportions)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        total = sum(width * count for width, count in zip(widths, counts(middle), strict=True))
        low, high = (middle, high) if total <= wanted else (low, middle)
    return [round(count) for count in counts(high)]


def stages_from_the_start(
    num_tokens: int, rate: float, num_layers: int, layers: Sequence[int], ratios: Sequence[float]
) -> tuple[int, dict[int, int]]:
    """Tokens that the language model receives, and those left from each layer on.

    Args:
        ratios: of each layer's count to the one before it.
    """
    parts = [1.0]
    for ratio in ratios:
        parts.append(parts[-1] * ratio)
    ends = [*layers, num_layers]
    widths = [end - start for start, end in zip([0, *layers], ends, strict=True)]
    wanted = target_average(num_tokens, rate) * num_layers
    first, *later = _solved(num_tokens, wanted, widths, parts)
    return first, dict(zip(layers, later, strict=True))


def two_stages(
    num_tokens: int, rate: float, num_layers: int, layer: int, ratio: float
) -> tuple[int, dict[int, int]]:
    """Tokens that the language model receives, and those left from a layer on: `ratio` of them."""
    total = target_average(num_tokens, rate) * num_layers
    first = min(num_tokens, max(1, round(total / (layer + ratio * (num_layers - layer)))))
    second = round((total - first * layer) / (num_layers - layer))
    return first, {layer: min(first, max(1, second))}
