# SPDX-License-Identifier: Apache-2.0
"""What a server says of eviction at its start, and `check` before: groups, better layers, savings."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedFlagError
from vllm_crop.eviction.grouping import KVGrouping, predict_grouping, predict_packed_grouping
from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.planning.budget import BudgetError, Method, method_evicts, retained_per_stage

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.plugins.crop")


def packed_layout() -> bool:
    """Whether blocks are outermost in the KV cache, so that stages can have blocks of different sizes.

    The variable is final: vLLM refuses to start if the attention backend lacks the layout. Its own choice is
    not settled yet when layers are asked for their specs.
    """
    return os.environ.get("VLLM_KV_CACHE_LAYOUT", "").upper().startswith("BL")


def expected_grouping(
    num_layers: int, stages: tuple[int, ...], block_size: int, looking: Sequence[int] | None = None
) -> KVGrouping:
    """The KV cache groups vLLM should make.

    Args:
        looking: the layers of a hybrid that have keys and values; its blocks are never outermost.
    """
    if packed_layout():
        return predict_packed_grouping(num_layers, stages, block_size)
    return predict_grouping(num_layers, stages, block_size, looking)


def report_start(
    kv_cache_config: "KVCacheConfig", hf_config: Any, stages: tuple[int, ...], block_size: int
) -> None:
    """Log groups, padding and expected KV.

    Raises:
        UnsupportedFlagError: vLLM has grouped the layers otherwise than expected.
    """
    geometry = geometry_from_configs(hf_config.to_dict(), {})
    looking = tuple(geometry.looking_layers)
    if packed_layout():
        sizes = built_block_sizes(kv_cache_config)
        expected = predict_packed_grouping(geometry.num_layers, stages, min(sizes), sizes)
    else:
        expected = predict_grouping(geometry.num_layers, stages, block_size, looking)
    found = built_groups(kv_cache_config)
    if found != sorted((group.stage, group.num_layers) for group in expected.groups):
        raise UnsupportedFlagError(
            f"vLLM made KV cache groups (stage, layers) {found} for eviction layers {list(stages)}, expected "
            f"{expected.groups}: leave out VLLM_KV_CACHE_LAYOUT and --kv-cache-dtype-skip-layers, or tell us"
        )
    config = CropConfig.from_mapping(hf_config.crop)
    image_tokens = getattr(hf_config, "crop_max_image_tokens", geometry.max_tokens)
    method = config.method if method_evicts(config.method) else "plc+ilp"
    kept = retained_per_stage(image_tokens, config.pruning_rate, method, geometry.num_layers, stages)
    for line in describe(expected, image_tokens, kept):
        logger.info(line)
    if wasteful := warning(expected, geometry.first_eviction_layer):
        logger.warning(wasteful)


def built_groups(kv_cache_config: "KVCacheConfig") -> list[tuple[int, int]]:
    """Stage and number of layers of every KV cache group, sorted."""
    from vllm.v1.kv_cache_interface import iter_layer_specs

    groups = []
    for group in kv_cache_config.kv_cache_groups:
        stages = {getattr(spec, "stage", 0) for spec in iter_layer_specs(group.kv_cache_spec)}
        groups.append((max(stages), len(group.layer_names)))
    return sorted(groups)


def built_block_sizes(kv_cache_config: "KVCacheConfig") -> tuple[int, ...]:
    """Tokens per block of stages 0, 1, ..."""
    from vllm.v1.kv_cache_interface import iter_layer_specs

    sizes = {}
    for group in kv_cache_config.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            sizes[getattr(spec, "stage", 0)] = spec.block_size
    return tuple(sizes[stage] for stage in sorted(sizes))


TOLERANCE = 0.05  # of plain vLLM's KV memory, lost by an unpruned request


def describe(
    grouping: KVGrouping, image_tokens: int, kept_per_stage: Sequence[int], prompt_text_tokens: int = 64
) -> list[str]:
    """Lines for the log: groups, padding, and the KV memory of a request with one image.

    `kept_per_stage`: of the `image_tokens` tokens, those seen before the first eviction layer, then those
    that stay from each eviction layer on.
    """
    unpruned = [prompt_text_tokens + image_tokens] * len(grouping.block_sizes)
    pruned = [prompt_text_tokens + kept for kept in kept_per_stage]
    plain = grouping.plain_layer_tokens(unpruned[0])
    compressed = kept_per_stage[0] < image_tokens
    kept = ", then ".join(map(str, kept_per_stage if compressed else kept_per_stage[1:]))
    memory = "KV memory" if grouping.looking is None else "memory for KV and states"
    return [
        f"KV cache groups: {len(grouping.groups)} ({_groups_by_stage(grouping)}).",
        f"Padding makes an unpruned request take {grouping.padding_fraction:.1%} more KV memory "
        "than in plain vLLM.",
        f"With one image of {image_tokens} tokens, {kept} kept, and {prompt_text_tokens} text tokens "
        f"a request takes {grouping.layer_tokens(pruned) / plain:.1%} of plain vLLM's {memory} "
        f"(ideal {grouping.ideal_layer_tokens(pruned) / grouping.plain.ideal_layer_tokens(unpruned):.1%}, "
        f"unpruned {grouping.layer_tokens(unpruned) / plain:.1%}).",
    ]


def warning(grouping: KVGrouping, first: int = 1) -> str | None:
    """A line for the log if padding wastes more than `TOLERANCE`, with the nearest layers that do not.

    Args:
        first: the first layer the model can evict at.
    """
    if grouping.padding_fraction <= TOLERANCE:
        return None
    text = (
        f"eviction_layers {list(grouping.eviction_layers)} of {grouping.num_layers} layers make an unpruned "
        f"request take {grouping.padding_fraction:.1%} more KV memory than in plain vLLM"
    )
    better = nearest_good_layers(
        grouping.num_layers,
        grouping.eviction_layers,
        grouping.block_size,
        first=first,
        packed=grouping.packed,
        looking=grouping.looking,
    )
    if better is None:
        return f"{text}."
    return f"{text}; the nearest that stay within {TOLERANCE:.0%} are {list(better)}."


def nearest_good_layers(
    num_layers: int,
    eviction_layers: Sequence[int],
    block_size: int,
    tolerance: float = TOLERANCE,
    *,
    first: int = 1,
    packed: bool = False,
    looking: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Eviction layers that waste at most `tolerance`, moved by the fewest layers in all, early ones first.

    None where `eviction_layers` waste no more themselves, and where no others of their number do better.
    `first`: the first layer the model can evict at. `packed`: for a layout with the blocks outermost.
    `looking`: the layers of a hybrid that have keys and values, which has no such layout.
    """

    def padding_fraction(layers: Sequence[int]) -> float:
        if packed:
            return predict_packed_grouping(num_layers, layers, block_size).padding_fraction
        return predict_grouping(num_layers, layers, block_size, looking).padding_fraction

    if padding_fraction(eviction_layers) <= tolerance:
        return None
    for distance in range(1, num_layers * len(eviction_layers)):
        for layers in _moved(tuple(eviction_layers), distance, first - 1, num_layers):
            if padding_fraction(layers) <= tolerance:
                return layers
    return None


def _moved(layers: tuple[int, ...], distance: int, above: int, below: int) -> Iterator[tuple[int, ...]]:
    """All layers above < K1 < K2 < ... < below that are `distance` away in all, early ones first."""
    if not layers:
        if distance == 0:
            yield ()
        return
    for layer in range(max(above + 1, layers[0] - distance), min(below, layers[0] + distance + 1)):
        for rest in _moved(layers[1:], distance - abs(layer - layers[0]), layer, below):
            yield (layer, *rest)


def _groups_by_stage(grouping: KVGrouping) -> str:
    bounds = (0, *grouping.eviction_layers, grouping.num_layers)
    parts = []
    for stage in range(len(bounds) - 1):
        sizes = [group.num_layers for group in grouping.groups if group.stage == stage]
        size = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)}-{max(sizes)}"
        parts.append(f"layers {bounds[stage]}-{bounds[stage + 1] - 1}: {len(sizes)} x {size}")
    return "; ".join(parts)


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


def block_size_of(state_tokens: int) -> int:
    """Tokens in a block on a GPU.

    Args:
        state_tokens: of a hybrid, whose blocks must hold a state too.
    """
    return BLOCK_SIZE * max(1, -(-state_tokens // BLOCK_SIZE))


def savings(
    num_tokens: int,
    num_layers: int,
    eviction_layer: int,
    block_size: int = BLOCK_SIZE,
    looking: Sequence[int] | None = None,
) -> list[Saving]:
    """Every method at every budget that it can meet, for an image of `num_tokens` visual tokens.

    Args:
        looking: the layers that have keys and values; None for all.
    """
    grouping, found = predict_grouping(num_layers, (eviction_layer,), block_size, looking), []
    for rate in BUDGETS:
        for method in _METHODS:
            layers = () if method == "plc" else (eviction_layer,)
            try:
                tokens = retained_per_stage(num_tokens, rate, method, num_layers, layers)
            except BudgetError:
                continue
            found.append(Saving(rate, method, tokens, _kv(num_tokens, tokens, grouping)))
    return found


_METHODS: tuple[Method, ...] = ("plc", "ilp", "plc+ilp")


def _kv(num_tokens: int, kept: tuple[int, ...], grouping: KVGrouping) -> float:
    """On a server that is prepared for eviction, as all methods can be asked for there."""
    stages = kept if len(kept) == 2 else kept * 2
    pruned = grouping.layer_tokens([TEXT_TOKENS + count for count in stages])
    return pruned / grouping.plain_layer_tokens(TEXT_TOKENS + num_tokens)
