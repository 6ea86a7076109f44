# SPDX-License-Identifier: Apache-2.0
"""How long the host takes to work out one decode step of requests that evict."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_crop.eviction.prompt_eviction import from_leaving_stages
from vllm_crop.eviction.stage_inputs import RunningEvictions

CALLS = 500
PROMPT_TOKENS, EVICTED_TOKENS = 640, 500


@dataclass(frozen=True)
class ViewTimes:
    """RunningEvictions.views for one step in microseconds: median, and 10 to 90 percent of the calls."""

    running: int
    median_us: float
    p10_us: float
    p90_us: float


def time_views(running: Sequence[int], num_stages: int) -> tuple[ViewTimes, ...]:
    """Time steps in which so many requests generate a token each; every stage evicts the same number."""
    per_stage = EVICTED_TOKENS // num_stages
    leaving = [
        (stage, np.arange(per_stage, dtype=np.int64) + (stage - 1) * per_stage)
        for stage in range(1, num_stages + 1)
    ]
    eviction = from_leaving_stages(leaving, num_stages)
    found = []
    for count in running:
        evictions = RunningEvictions(count, num_stages)
        for slot in range(count):
            evictions.set(slot, eviction)
        slots, ones = np.arange(count), np.ones(count, dtype=np.int64)
        times = []
        for call in range(CALLS):
            computed = ones * (PROMPT_TOKENS + call)
            start = time.perf_counter()
            evictions.views(slots, computed, ones)
            times.append(1e6 * (time.perf_counter() - start))
        low, middle, high = np.percentile(times, [10, 50, 90])
        found.append(ViewTimes(count, float(middle), float(low), float(high)))
    return tuple(found)
