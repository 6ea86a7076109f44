# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint could save: an eviction layer to begin with, and KV memory at three budgets."""

from dataclasses import dataclass

from vllm_crop.budget import BudgetError, Method, retained_per_stage
from vllm_crop.eviction.grouping import predict_grouping

BUDGETS = (0.667, 0.778, 0.889)  # the paper's (section 4.1): 1/3, 2/9 and 1/9 of the tokens left
BLOCK_SIZE = 16  # vLLM's on GPUs
TEXT_TOKENS = 64  # of the prompt that savings are told for
# Layers before the eviction see all tokens. They may spend this much of the smallest budget; what is left
# must do for all layers after it.
EARLY_SHARE = 0.6


@dataclass(frozen=True)
class Saving:
    """What one method makes of an image and a short question at one rate.

    Attributes:
        image_tokens: per stage, the layers below the eviction layer first.
        kv: the prompt's KV memory, whole blocks and padding included, against the unpruned prompt's in vLLM
            without the plugin.
    """

    pruning_rate: float
    method: Method
    image_tokens: tuple[int, ...]
    kv: float


def recommended_layer(num_layers: int, first: int = 1) -> int:
    """One eviction layer to begin with: the latest that leaves enough of the smallest budget.

    Below it all tokens still see the whole image. The later it is, the more they have taken in, and the fewer
    image tokens are left above it.

    Args:
        num_layers: decoder layers.
        first: the first layer at which the model can evict.
    """
    return max(first, int(EARLY_SHARE * (1 - BUDGETS[-1]) * num_layers))


def savings(num_tokens: int, num_layers: int, eviction_layer: int) -> list[Saving]:
    """Every method at every budget that it can meet, for an image of `num_tokens` visual tokens."""
    found = []
    for rate in BUDGETS:
        for method in _METHODS:
            layers = () if method == "plc" else (eviction_layer,)
            try:
                tokens = retained_per_stage(num_tokens, rate, method, num_layers, layers)
            except BudgetError:
                continue
            found.append(Saving(rate, method, tokens, _kv(num_tokens, tokens, num_layers, eviction_layer)))
    return found


_METHODS: tuple[Method, ...] = ("plc", "ilp", "plc+ilp")


def _kv(num_tokens: int, kept: tuple[int, ...], num_layers: int, eviction_layer: int) -> float:
    """On a server that is prepared for eviction, as all methods can be asked for there."""
    grouping = predict_grouping(num_layers, (eviction_layer,), BLOCK_SIZE)
    stages = kept if len(kept) == 2 else kept * 2
    pruned = grouping.layer_tokens([TEXT_TOKENS + count for count in stages])
    return pruned / grouping.plain_layer_tokens(TEXT_TOKENS + num_tokens)
