# SPDX-License-Identifier: Apache-2.0
"""KV cache use of a running server, sampled from its /metrics."""

import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from vllm_crop.eviction.grouping import KVGrouping
from vllm_crop.measuring.metrics import metric_sum, samples
from vllm_crop.measuring.server import ServerError, get_text

SAMPLE_INTERVAL_S = 0.2


@dataclass(frozen=True)
class KVCapacity:
    """The KV cache of one engine.

    Attributes:
        blocks: without vLLM's null block, which is never used.
        block_size: tokens in a block of plain vLLM.
        tokens_per_block: tokens whose KV of all layers takes the memory of a block: `block_size` in plain
            vLLM, fewer where a block serves a group of the layers.
    """

    blocks: int
    block_size: int
    tokens_per_block: float

    @classmethod
    def of_server(cls, base_url: str) -> Self:
        """Read `vllm:cache_config_info`, taking the server for plain vLLM.

        Raises:
            ServerError: the server publishes no such metric.
        """
        found = samples(get_text(f"{base_url}/metrics"), "vllm:cache_config_info")
        labels, _ = next(found, ({}, 0.0))
        if not {"num_gpu_blocks", "block_size"} <= labels.keys():
            raise ServerError(f"{base_url}/metrics has no vllm:cache_config_info with num_gpu_blocks")
        block_size = int(labels["block_size"])
        return cls(int(labels["num_gpu_blocks"]) - 1, block_size, block_size)

    def of_grouping(self, grouping: KVGrouping) -> Self:
        """The same with a server's KV cache groups."""
        return replace(self, tokens_per_block=grouping.block_layer_tokens / grouping.num_layers)


def blocks_in_use(base_url: str, capacity: KVCapacity) -> int:
    """Blocks that running requests hold now, by the gauge `vllm:kv_cache_usage_perc`.

    Raises:
        OSError: the server does not answer.
    """
    return round(metric_sum(get_text(f"{base_url}/metrics"), "vllm:kv_cache_usage_perc") * capacity.blocks)


@dataclass(frozen=True)
class KVUsage:
    """The most that running requests held in any of a run's samples.

    `peak_tokens`: tokens whose KV of all layers takes the same memory.
    """

    peak_blocks: int
    peak_tokens: float
    samples: int


class KVSampler:
    """Samples the gauge `vllm:kv_cache_usage_perc` in a thread while its block runs.

    The gauge moves once per engine step and counts blocks of running requests only, not those that are
    kept for later prefix hits. Between two samples a peak can be missed.
    """

    def __init__(self, base_url: str, capacity: KVCapacity) -> None:
        self.base_url = base_url
        self.capacity = capacity
        self._values: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def usage(self) -> KVUsage:
        """What the samples say; zero without any.

        The peak only: a mean over time would be wrong, because the gauge still shows the state before it
        during a long prefill.
        """
        peak = max(self._values, default=0)
        return KVUsage(peak, peak * self.capacity.tokens_per_block, len(self._values))

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            with suppress(OSError):
                self._values.append(blocks_in_use(self.base_url, self.capacity))
