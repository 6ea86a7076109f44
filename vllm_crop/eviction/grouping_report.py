# SPDX-License-Identifier: Apache-2.0
"""What a server says at its start about its KV cache groups, and better eviction layers where they waste."""

from collections.abc import Iterator, Sequence

from vllm_crop.eviction.grouping import KVGrouping, predict_grouping, predict_packed_grouping

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
    return [
        f"KV cache groups: {len(grouping.groups)} ({_groups_by_stage(grouping)}).",
        f"Padding makes an unpruned request take {grouping.padding_fraction:.1%} more KV memory "
        "than in plain vLLM.",
        f"With one image of {image_tokens} tokens, {kept} kept, and {prompt_text_tokens} text tokens "
        f"a request takes {grouping.layer_tokens(pruned) / plain:.1%} of plain vLLM's KV memory "
        f"(ideal {grouping.ideal_layer_tokens(pruned) / (grouping.num_layers * unpruned[0]):.1%}, "
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
) -> tuple[int, ...] | None:
    """Eviction layers that waste at most `tolerance`, moved by the fewest layers in all, early ones first.

    None where `eviction_layers` waste no more themselves, and where no others of their number do better.
    `first`: the first layer the model can evict at. `packed`: for a layout with the blocks outermost.
    """
    predict = predict_packed_grouping if packed else predict_grouping
    if predict(num_layers, eviction_layers, block_size).padding_fraction <= tolerance:
        return None
    for distance in range(1, num_layers * len(eviction_layers)):
        for layers in _moved(tuple(eviction_layers), distance, first - 1, num_layers):
            if predict(num_layers, layers, block_size).padding_fraction <= tolerance:
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
        size = f"{sizes[-1]}" if sizes[0] == sizes[-1] else f"{sizes[-1]}-{sizes[0]}"
        parts.append(f"layers {bounds[stage]}-{bounds[stage + 1] - 1}: {len(sizes)} x {size}")
    return "; ".join(parts)
