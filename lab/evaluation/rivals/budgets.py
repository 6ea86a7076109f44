# SPDX-License-Identifier: Apache-2.0
"""The same budget for every rival: tokens averaged over layers, as planning/budget.py counts them."""

from vllm_crop.planning.budget import BudgetError, retained_per_stage


def latest_first_layer(num_tokens: int, rate: float, num_layers: int, wanted: int) -> int:
    """The first layer at which tokens may leave: the paper's, or the latest that the budget allows.

    Raises:
        BudgetError: not even leaving at layer 1 meets the rate.
    """
    for layer in range(wanted, 0, -1):
        try:
            retained_per_stage(num_tokens, rate, "ilp", num_layers, (layer,))
        except BudgetError:
            if layer == 1:
                raise
        else:
            return layer
    raise BudgetError("no decoder layer at which tokens could leave")


def one_shot(num_tokens: int, rate: float, num_layers: int, wanted: int) -> dict[int, int]:
    """Tokens leave once."""
    layer = latest_first_layer(num_tokens, rate, num_layers, wanted)
    return stages(num_tokens, rate, num_layers, (layer,))


def stages(num_tokens: int, rate: float, num_layers: int, layers: tuple[int, ...]) -> dict[int, int]:
    """Tokens left from each layer on; every stage keeps the same fraction."""
    _, *left = retained_per_stage(num_tokens, rate, "ilp", num_layers, layers)
    return dict(zip(layers, left, strict=True))


def pyramid(num_tokens: int, rate: float, num_layers: int) -> dict[int, int]:
    """Three stages: at the quarters of the model, or from the latest first layer on at even distances."""
    first = latest_first_layer(num_tokens, rate, num_layers, num_layers // 4)
    step = (num_layers - first) / 3
    layers = tuple(dict.fromkeys(first + round(stage * step) for stage in range(3)))
    return stages(num_tokens, rate, num_layers, layers)
