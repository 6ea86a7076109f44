# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, telling the KV cache managers what each request evicts."""

import os
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_crop.eviction.kv_cache import StageKVCacheManager
from vllm_crop.eviction.markers import EvictionSettings, image_placeholders
from vllm_crop.eviction.prefix_cache import PlannedBlockHashes
from vllm_crop.eviction.prompt_eviction import PromptEviction, read_markers
from vllm_crop.eviction.report import report_start


def debug() -> bool:
    """`VLLM_CROP_DEBUG=1`: check the bookkeeping of eviction after every scheduling step. Costs time."""
    return os.environ.get("VLLM_CROP_DEBUG", "0") not in ("", "0")


class EvictionSchedulerMixin(Scheduler):
    """Reads a request's eviction from its prompt once, when it arrives."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        hf_config = vllm_config.model_config.hf_config
        self.eviction_settings = EvictionSettings.from_hf_config(hf_config)
        report_start(
            self.kv_cache_config,
            hf_config,
            self.eviction_settings.stages,
            vllm_config.cache_config.block_size,
        )
        self._debug = debug()
        # Lives as long as the request's own block hashes do, whatever way the request ends.
        evictions: WeakValueDictionary[str, PromptEviction] = WeakValueDictionary()
        self.evictions = evictions
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._stage_managers = [manager for manager in managers if isinstance(manager, StageKVCacheManager)]
        for manager in self._stage_managers:
            manager.evictions = evictions

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream."""
        output = super().schedule(*args, **kwargs)
        if self._debug:
            check_step(self.running, self._stage_managers)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; what a request leaves behind in its only step is published before it is freed."""
        for manager in self._stage_managers:
            manager.publish_tails()
        return super().update_from_output(*args, **kwargs)

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """As upstream."""
        eviction = read_markers(
            request.prompt_token_ids or (),
            image_placeholders(request.mm_features),
            self.eviction_settings.marker_ids,
        )
        # An earlier request of this id may still be in memory.
        self.evictions.pop(request.request_id, None)
        if eviction is not None:
            self.evictions[request.request_id] = eviction
            request.block_hashes = PlannedBlockHashes(request.block_hashes, eviction)
        super().add_request(request, *args, **kwargs)


class EvictionScheduler(EvictionSchedulerMixin):
    """For synchronous scheduling."""


class EvictionAsyncScheduler(EvictionSchedulerMixin, AsyncScheduler):
    """For asynchronous scheduling."""


def make_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The value of `scheduler_cls`: whether scheduling is asynchronous is not known when it is set."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = EvictionAsyncScheduler if is_async else EvictionScheduler
    return scheduler(vllm_config, *args, **kwargs)


def check_step(running: Iterable[Any], managers: Iterable[StageKVCacheManager]) -> None:
    """Check the stages' KV blocks of running requests (vllm/v1/request.py), tokens of this step included.

    Raises:
        AssertionError: saying which request and what is wrong.
    """
    requests = list(running)
    for manager in managers:
        _check_group(requests, manager)


def _check_group(requests: list[Any], manager: StageKVCacheManager) -> None:
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
