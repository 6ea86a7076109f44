# SPDX-License-Identifier: Apache-2.0
"""The KV cache of layers that run without evicted tokens: its spec, and the manager of its blocks.

Follows vllm/v1/core/single_type_kv_cache_manager.py. vLLM speaks to a manager in tokens of the request; here
they become KV entries of the stage, and everything else is inherited.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_crop.eviction import prefix_cache
from vllm_crop.eviction.prompt_eviction import PromptEviction

_ONLY_IN_FULL = ("sliding_window", "attention_chunk_size", "non_causal")


@dataclass(frozen=True, kw_only=True)
class StageAttentionSpec(AttentionSpec):
    """KV of a layer from the `stage`-th eviction layer on.

    No FullAttentionSpec: its subclasses share one group with it, and vLLM takes their prefix-cache hits for
    downward closed in tokens (vllm/v1/core/kv_cache_coordinator.py).
    """

    stage: int

    @classmethod
    def from_full(cls, spec: Any, stage: int, layer_name: str) -> "StageAttentionSpec":
        """The stock spec of a layer, for a stage.

        Raises:
            ValueError: the layer has another kind of KV cache than plain full attention.
        """
        is_full = type(spec) is FullAttentionSpec
        if not is_full or spec.sliding_window or spec.attention_chunk_size:
            raise ValueError(f"eviction needs plain full attention, but {layer_name} has {spec}")
        return replace_as(spec, cls, drop=_ONLY_IN_FULL, stage=stage)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """The worst case, a request that evicts nothing."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Stages never share a group."""
        return all(
            isinstance(spec, StageAttentionSpec) and spec.stage == self.stage
            for spec in kv_cache_specs.values()
        )


class StageKVCacheManager(SingleTypeKVCacheManager):
    """Allocates blocks for kept tokens only. The scheduler gives it the evictions of its requests."""

    kv_cache_spec: StageAttentionSpec

    def __init__(self, kv_cache_spec: StageAttentionSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.stage = kv_cache_spec.stage
        self.evictions: Mapping[str, PromptEviction] = {}
        self._new_tails: list[prefix_cache.Tail] = []
        self._num_published: dict[str, int] = {}  # tokens whose tails are published or in _new_tails

    def num_kept(self, request_id: str, num_tokens: int) -> int:
        """KV entries this stage holds for the request's first `num_tokens` tokens."""
        eviction = self.evictions.get(request_id)
        return num_tokens if eviction is None else eviction.num_kept(self.stage, num_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            self.num_kept(request_id, num_tokens),
            new_computed_blocks,
            self.num_kept(request_id, total_computed_tokens),
            self.num_kept(request_id, num_local_computed_tokens),
            self.num_kept(request_id, num_tokens_main_model),
            *args,
            **kwargs,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self.num_kept(request_id, num_local_computed_tokens),
            num_external_computed_tokens,
            *args,
            **kwargs,
        )
        self._num_published[request_id] = num_local_computed_tokens

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """KV connectors are refused at start: they take block i for tokens i x block_size on."""
        raise AssertionError("KV connectors cannot be used with eviction")

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(
            request_id,
            self.num_kept(request_id, num_tokens),
            self.num_kept(request_id, num_tokens_main_model),
            *args,
            **kwargs,
        )

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish blocks that `num_tokens` tokens have filled; partly filled ones follow a step later."""
        request_id = request.request_id
        published = self._num_published.get(request_id, 0)
        if num_tokens <= published:  # most steps of decoding
            return
        blocks = self.req_to_blocks[request_id]
        hash_size = self.block_pool.hash_block_size
        hashes = prefix_cache.StageHashes(request.block_hashes, hash_size, self.stage, self.block_size)
        # Kept tokens in blocks of 4, computed up to the bar; vLLM's hashes cover 4 tokens of the prompt each:
        #
        #   prompt   0  1  2  3 | 4  5  6  7 | 8  9 10 11 | 12       5, 6, 8 and 9 are evicted
        #   kept     0  1  2  3 | 4  7 10 11 | 12
        #            full: h0     full: h2     tail, under the hash of each prefix that ends in it
        #
        # The second block is full after token 11, so its key is the hash that covers 11, not the second one.
        num_cached, num_full = self.num_cached_block.get(request_id, 0), hashes.num_full_blocks(num_tokens)
        for index in range(num_cached, num_full):
            self._publish(hashes.full_block_hash(index), blocks[index])
        self.num_cached_block[request_id] = max(num_cached, num_full)
        step = self.cache_hit_alignment_tokens
        for prefix in range(published - published % step + step, num_tokens + 1, step):
            if (tail := hashes.tail_hash(prefix)) is not None:
                index = hashes.num_kept(prefix) // self.block_size
                self._new_tails.append(prefix_cache.Tail(tail, request_id, index, blocks[index]))
        self._num_published[request_id] = num_tokens

    def new_step_starts(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, and publish what the last step has left partly filled."""
        super().new_step_starts(*args, **kwargs)
        self.publish_tails()

    def publish_tails(self) -> None:
        """Publish tails of steps scheduled before: a copy made in its own step would precede the content."""
        for tail in self._new_tails:
            blocks = self.req_to_blocks.get(tail.request_id, ())
            if tail.index < len(blocks) and blocks[tail.index] is tail.block:
                self._publish(tail.block_hash, tail.block)
        self._new_tails.clear()

    def pop_blocks_for_free(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """As upstream; tails not published yet are forgotten."""
        self._new_tails = [tail for tail in self._new_tails if tail.request_id != request_id]
        self._num_published.pop(request_id, None)
        return super().pop_blocks_for_free(request_id, *args, **kwargs)

    def _publish(self, block_hash: BlockHash | None, block: KVCacheBlock) -> None:
        assert block_hash is not None
        key = prefix_cache.make_key(block_hash, self.kv_cache_group_id)
        self.block_pool._insert_block_hash(key, block, None)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest aligned prefix whose kept tokens are all in cached blocks, the last maybe in a tail."""
        lookup = prefix_cache.StageHashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.stage, kv_cache_spec.block_size
        )
        return prefix_cache.longest_hit(
            lookup,
            lambda block_hash: block_pool.get_cached_block(block_hash, kv_cache_group_ids),
            len(kv_cache_group_ids),
            max_length,
            alignment_tokens,
        )


def register() -> None:
    """Tell vLLM of the spec, after the built-in ones: a registry that is not empty never gets them."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # any question registers them
    KVCacheSpecRegistry.register(StageAttentionSpec, StageKVCacheManager)


register()
