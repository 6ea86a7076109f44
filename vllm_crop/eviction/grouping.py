# SPDX-License-Identifier: Apache-2.0
"""How vLLM groups the layers of a model with eviction, and what KV memory that costs a request.

With eviction layers K1 < K2 < ..., stage 0 is layers 0..K1-1 (KV of all tokens) and stage s starts at the
s-th eviction layer. vLLM gives layers of different stages different block tables, in groups that share one
pool of blocks: every block id stands for the memory that the largest group needs, whoever takes it.
Memory is counted in layer-tokens, the keys and values of one token in one layer. In a hybrid some layers
have a state instead: a block of it for each request, whatever its length (vLLM gives attention blocks of as
many tokens as that takes).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

PACKED_ALIGNMENT_TOKENS = 256  # prefix-cache hits end at multiples of the block sizes' lcm
PACKED_REQUEST_TOKENS = 640  # the request that block sizes are chosen for: an image and a question


@dataclass(frozen=True)
class KVGroup:
    """Layers of one stage that share a block table; `has_state` instead of keys and values."""

    stage: int
    num_layers: int
    has_state: bool = False


@dataclass(frozen=True)
class KVGrouping:
    """vLLM's KV cache groups for one model.

    `block_size` is plain vLLM's, `block_sizes[s]` that of the layers of stage s, in tokens. `packed`: the
    KV cache layout has the blocks outermost, so groups with different block sizes share a block's bytes.
    `looking`: the layers of a hybrid that have keys and values; None if all have.
    """

    num_layers: int
    eviction_layers: tuple[int, ...]
    block_size: int
    block_sizes: tuple[int, ...]
    groups: tuple[KVGroup, ...]
    packed: bool
    looking: tuple[int, ...] | None = None

    @property
    def plain(self) -> "KVGrouping":
        """Plain vLLM's groups for the same model."""
        return predict_grouping(self.num_layers, (), self.block_size, self.looking)

    @property
    def block_layer_tokens(self) -> int:
        """Layer-tokens of memory behind one block id."""
        return max(group.num_layers * self.block_sizes[group.stage] for group in self.groups)

    @property
    def padding_fraction(self) -> float:
        """What a long unpruned request takes beyond plain vLLM's KV memory, as a fraction of that, >= 0."""
        return float(self._layer_tokens_per_token / self.plain._layer_tokens_per_token - 1)

    @property
    def _layer_tokens_per_token(self) -> Fraction:
        sizes = [self.block_sizes[group.stage] for group in self.groups if not group.has_state]
        return self.block_layer_tokens * sum((Fraction(1, size) for size in sizes), Fraction(0))

    def layer_tokens(self, tokens_per_stage: Sequence[int]) -> int:
        """Memory of a request with `tokens_per_stage[s]` tokens in stage s, blocks and padding included."""
        blocks = [
            _ceil_div(tokens, size) for tokens, size in zip(tokens_per_stage, self.block_sizes, strict=True)
        ]
        return self.block_layer_tokens * sum(
            1 if group.has_state else blocks[group.stage] for group in self.groups
        )

    def ideal_layer_tokens(self, tokens_per_stage: Sequence[int]) -> int:
        """The same without blocks of tokens and padding: each stage's layers times its tokens."""
        return sum(
            group.num_layers * (self.block_size if group.has_state else tokens_per_stage[group.stage])
            for group in self.groups
        )

    def plain_layer_tokens(self, tokens: int) -> int:
        """Memory of a request of `tokens` tokens in plain vLLM, rounded up to blocks."""
        return self.plain.layer_tokens((tokens,))


def layers_per_stage(num_layers: int, eviction_layers: Sequence[int]) -> tuple[int, ...]:
    """Number of layers of each stage, stage 0 first; ValueError unless 0 < K1 < K2 < ... < num_layers."""
    bounds = (0, *eviction_layers, num_layers)
    counts = tuple(bounds[stage + 1] - bounds[stage] for stage in range(len(bounds) - 1))
    if min(counts) < 1:
        raise ValueError(
            f"eviction layers must increase within 1..{num_layers - 1}, got {list(eviction_layers)}"
        )
    return counts


def predict_grouping(
    num_layers: int, eviction_layers: Sequence[int], block_size: int, looking: Sequence[int] | None = None
) -> KVGrouping:
    """vLLM's grouping in its usual layouts, where all groups have blocks of `block_size` tokens.

    Mirrors `_get_kv_cache_groups_uniform_page_size`: layers of one kind and stage belong together. Groups are
    as large as the fewest of these, or as the most where that is less than half as large again. The last
    groups of a stage may be padded.

    Args:
        looking: the layers that have keys and values; None for all.
    """
    num_stages = len(layers_per_stage(num_layers, eviction_layers))
    if looking is not None:
        looking = None if len(looking) == num_layers else tuple(looking)
    counts = _layers_per_kind(num_layers, eviction_layers, looking)
    fewest, most = min(counts.values()), max(counts.values())
    group_size = most if most < 1.5 * fewest else fewest
    groups = []
    for (stage, has_state), count in counts.items():
        num_groups = _ceil_div(count, group_size)
        # Layers are dealt out in turn, so the first groups may get one more.
        groups += [KVGroup(stage, _ceil_div(count - i, num_groups), has_state) for i in range(num_groups)]
    sizes = (block_size,) * num_stages
    return KVGrouping(
        num_layers, tuple(eviction_layers), block_size, sizes, tuple(groups), packed=False, looking=looking
    )


def _layers_per_kind(
    num_layers: int, eviction_layers: Sequence[int], looking: tuple[int, ...] | None
) -> dict[tuple[int, bool], int]:
    """How many layers there are of each stage, without and with a state, in the order of their first."""
    counts: dict[tuple[int, bool], int] = {}
    for stage, layers in enumerate(pairwise((0, *eviction_layers, num_layers))):
        for layer in range(*layers):
            kind = stage, looking is not None and layer not in looking
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def predict_packed_grouping(
    num_layers: int,
    eviction_layers: Sequence[int],
    block_size: int,
    block_sizes: Sequence[int] | None = None,
) -> KVGrouping:
    """vLLM's grouping in layouts with the blocks outermost, one group per stage.

    `block_sizes`: tokens in a block of each stage, `packed_block_sizes` unless given. Where all are equal
    vLLM groups as in its usual layouts.
    """
    sizes = block_sizes or packed_block_sizes(num_layers, eviction_layers, block_size)
    if len(set(sizes)) == 1:
        usual = predict_grouping(num_layers, eviction_layers, block_size)
        return replace(usual, block_sizes=tuple(sizes), packed=True)
    groups = tuple(
        KVGroup(stage, count) for stage, count in enumerate(layers_per_stage(num_layers, eviction_layers))
    )
    return KVGrouping(num_layers, tuple(eviction_layers), block_size, tuple(sizes), groups, packed=True)


def packed_block_sizes(num_layers: int, eviction_layers: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Block size of each stage for a layout with the blocks outermost: multiples of `block_size`.

    Stages with few layers get large blocks, so that a block takes about the same memory in every stage.
    The lcm of the sizes is at most `PACKED_ALIGNMENT_TOKENS`, or two blocks of `block_size`.
    """

    def cost(grouping: KVGrouping) -> tuple[int, Fraction]:
        # On average half of a request's last block stays empty, in every group.
        blocks = Fraction(len(grouping.groups), 2)
        for group in grouping.groups:
            blocks += Fraction(PACKED_REQUEST_TOKENS, grouping.block_sizes[group.stage])
        # Equal sizes may need more groups than stages, which this layout is there to avoid.
        return len(grouping.groups), grouping.block_layer_tokens * blocks

    counts = layers_per_stage(num_layers, eviction_layers)
    groupings = [
        predict_packed_grouping(num_layers, eviction_layers, block_size, sizes)
        for sizes in sorted(set(_packed_candidates(counts, block_size)))
    ]
    return min(groupings, key=cost).block_sizes


def _packed_candidates(counts: tuple[int, ...], block_size: int) -> Iterator[tuple[int, ...]]:
    """For each alignment and each memory of a block: the largest block size of every stage that fits."""
    for alignment in range(1, max(PACKED_ALIGNMENT_TOKENS // block_size, 2) + 1):
        divisors = [size for size in range(1, alignment + 1) if alignment % size == 0]
        for memory in {count * size for count in counts for size in divisors}:
            if memory >= max(counts):
                yield tuple(
                    block_size * max(size for size in divisors if size * count <= memory) for count in counts
                )


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
