# SPDX-License-Identifier: Apache-2.0
"""What must hold after every scheduling step; checked with VLLM_CROP_DEBUG=1."""

from collections.abc import Iterable
from typing import Any

from vllm.utils.math_utils import cdiv

from vllm_crop.eviction.kv_cache import PrunedKVCacheManager


def check_step(running: Iterable[Any], managers: Iterable[PrunedKVCacheManager]) -> None:
    """Check the late KV blocks of running requests (vllm/v1/request.py), tokens of this step included.

    Raises:
        AssertionError: saying which request and what is wrong.
    """
    requests = list(running)
    for manager in managers:
        _check_group(requests, manager)


def _check_group(requests: list[Any], manager: PrunedKVCacheManager) -> None:
    written: dict[int, str] = {}
    for request in requests:
        request_id = request.request_id
        where = f"request {request_id}, KV cache group {manager.kv_cache_group_id}"
        eviction = manager.evictions.get(request_id)
        if eviction is not None:
            assert eviction.end < request.num_prompt_tokens, f"{where}: the last prompt token is evicted"
        kept = manager.num_kept(request_id, request.num_computed_tokens)
        blocks = manager.req_to_blocks.get(request_id, [])
        needed = cdiv(kept, manager.block_size)
        assert len(blocks) == needed, f"{where}: {len(blocks)} blocks for {kept} kept tokens, not {needed}"
        if kept % manager.block_size:  # the next token is written into the last block
            last = blocks[-1]
            other = written.setdefault(last.block_id, request_id)
            assert other == request_id, f"{where}: shares block {last.block_id} with request {other}"
