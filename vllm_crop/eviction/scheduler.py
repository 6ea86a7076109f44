# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, telling the KV cache managers what each request evicts."""

from typing import Any
from weakref import WeakValueDictionary

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_crop import envs
from vllm_crop.eviction.invariants import check_step
from vllm_crop.eviction.kv_cache import PrunedKVCacheManager
from vllm_crop.eviction.prefix_cache import PlannedBlockHashes
from vllm_crop.eviction.prompt_eviction import PromptEviction, read_labels
from vllm_crop.eviction.settings import EvictionSettings, image_placeholders
from vllm_crop.eviction.start_report import report_start


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
        self._debug = envs.debug()
        # Lives as long as the request's own block hashes do, whatever way the request ends.
        evictions: WeakValueDictionary[str, PromptEviction] = WeakValueDictionary()
        self.evictions = evictions
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._late = [manager for manager in managers if isinstance(manager, PrunedKVCacheManager)]
        for manager in self._late:
            manager.evictions = evictions

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream."""
        output = super().schedule(*args, **kwargs)
        if self._debug:
            check_step(self.running, self._late)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; what a request leaves behind in its only step is published before it is freed."""
        for manager in self._late:
            manager.publish_tails()
        return super().update_from_output(*args, **kwargs)

    def add_request(self, request: Request) -> None:
        """As upstream."""
        eviction = read_labels(
            request.prompt_token_ids or (),
            image_placeholders(request.mm_features),
            self.eviction_settings.label_ids,
        )
        # An earlier request of this id may still be in memory.
        self.evictions.pop(request.request_id, None)
        if eviction is not None:
            self.evictions[request.request_id] = eviction
            request.block_hashes = PlannedBlockHashes(request.block_hashes, eviction)
        super().add_request(request)


class EvictionScheduler(EvictionSchedulerMixin):
    """For synchronous scheduling."""


class EvictionAsyncScheduler(EvictionSchedulerMixin, AsyncScheduler):
    """For asynchronous scheduling."""


def make_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The value of `scheduler_cls`: whether scheduling is asynchronous is not known when it is set."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = EvictionAsyncScheduler if is_async else EvictionScheduler
    return scheduler(vllm_config, *args, **kwargs)
