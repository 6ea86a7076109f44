# SPDX-License-Identifier: Apache-2.0
"""Prefix-cache keys of blocks whose n-th entry is the n-th kept token, and the lookup by them.

A block hash of vLLM covers the whole prompt up to some token, markers included, so it names what a stage has
kept of that prompt too. A full block is found under the hash that covers its last kept token; a partly
filled one, a tail, under the hash of every prefix it was the last block of, marked as a tail. No two blocks
share a key: hash blocks are no longer than the stage's blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from vllm_crop.eviction.prompt_eviction import PromptEviction

make_key = make_block_hash_with_group_id
_TAIL = b"crop-tail"


class PlannedBlockHashes(list[BlockHash]):
    """A request's block hashes with its eviction: the lookup is a class method that sees no request."""

    def __init__(self, block_hashes: Sequence[BlockHash], eviction: PromptEviction) -> None:
        super().__init__(block_hashes)
        self.eviction = eviction


@dataclass(frozen=True)
class Tail:
    """A partly filled block of a request, waiting for its step to end."""

    block_hash: BlockHash
    request_id: str
    index: int
    block: KVCacheBlock


class StageHashes:
    """One request's hashes as one stage uses them."""

    def __init__(
        self, block_hashes: Sequence[BlockHash], hash_size: int, stage: int, block_size: int
    ) -> None:
        """`hash_size`: tokens per hash; `block_size`: KV entries per block of the stage."""
        self.block_hashes, self.hash_size = block_hashes, hash_size
        self.stage, self.block_size = stage, block_size
        self.eviction: PromptEviction | None = getattr(block_hashes, "eviction", None)

    def num_kept(self, num_tokens: int) -> int:
        """KV entries of the first `num_tokens` tokens."""
        return num_tokens if self.eviction is None else self.eviction.num_kept(self.stage, num_tokens)

    def token_index(self, kv_index: int) -> int:
        """The token of a KV entry."""
        return kv_index if self.eviction is None else self.eviction.token_index(self.stage, kv_index)

    def _hash_index(self, block_index: int) -> int:
        return self.token_index((block_index + 1) * self.block_size - 1) // self.hash_size

    def num_full_blocks(self, num_tokens: int) -> int:
        """Blocks filled by the first `num_tokens` tokens and with a hash that covers no token beyond."""
        num_full = self.num_kept(num_tokens) // self.block_size
        while num_full and (self._hash_index(num_full - 1) + 1) * self.hash_size > num_tokens:
            num_full -= 1
        return num_full

    def full_block_hash(self, block_index: int) -> BlockHash | None:
        """The hash a full block is found under, None if the prompt is not that long."""
        index = self._hash_index(block_index)
        return self.block_hashes[index] if index < len(self.block_hashes) else None

    def tail_hash(self, num_tokens: int) -> BlockHash | None:
        """The hash of the block that the first `num_tokens` tokens end in, None if they fill it."""
        index, beyond = divmod(num_tokens, self.hash_size)
        if (
            beyond
            or not 0 < index <= len(self.block_hashes)
            or self.num_kept(num_tokens) % self.block_size == 0
        ):
            return None
        return BlockHash(self.block_hashes[index - 1] + _TAIL)


Cached = Callable[[BlockHash], Sequence[KVCacheBlock] | None]


def longest_hit(
    hashes: StageHashes, cached: Cached, num_groups: int, max_length: int, alignment: int
) -> tuple[tuple[list[KVCacheBlock], ...], int]:
    """The blocks, per group, of the longest cached prefix of whole `alignment` tokens, and its length.

    Args:
        cached: the blocks of all groups under a hash, or None.
        max_length: most tokens the hit may have.
    """
    # Full blocks first, as far as all of them are cached. A hit may end inside the last of them, or in a tail
    # behind them, but only where all groups' blocks agree (`alignment`): try the ends from the longest down.
    full: list[Sequence[KVCacheBlock]] = []
    while (block_hash := hashes.full_block_hash(len(full))) is not None and (blocks := cached(block_hash)):
        full.append(blocks)
    # The next full block is not cached: the hit ends before its last entry.
    limit = min(max_length, hashes.token_index((len(full) + 1) * hashes.block_size - 1))
    for num_tokens in range(limit - limit % alignment, 0, -alignment):
        num_full, rest = divmod(hashes.num_kept(num_tokens), hashes.block_size)
        tail: Sequence[KVCacheBlock] | None = ()
        if rest:
            tail_hash = hashes.tail_hash(num_tokens)
            tail = cached(tail_hash) if tail_hash is not None else None
        if tail is not None:
            return _by_group(full[:num_full], tail, num_groups), num_tokens
    return _by_group([], (), num_groups), 0


def _by_group(
    full: Sequence[Sequence[KVCacheBlock]], tail: Sequence[KVCacheBlock], num_groups: int
) -> tuple[list[KVCacheBlock], ...]:
    rows: list[Sequence[Any]] = [*full, *([tail] if tail else [])]
    return tuple([row[group] for row in rows] for group in range(num_groups))
