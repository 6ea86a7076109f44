# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which order, and the numbers of one run."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from vllm_crop.benchmarking.kv import KVUsage
from vllm_crop.errors import CropError

# Unpruned on a server without the plugin, unpruned on the plugin's, its methods with the client's region, and
# the first of these with a region the server finds.
LocalizedMode = Literal["attention localizer", "engine localizer", "remote localizer"]
Mode = Literal["stock", "off", "plc", "ilp", "plc+ilp", LocalizedMode]
LOCALIZED_MODES: tuple[LocalizedMode, ...] = get_args(LocalizedMode)
WARM_UP = -1


class RunError(CropError):
    """A run gave no usable numbers."""


@dataclass(frozen=True)
class RunSpec:
    """One run of the load generator.

    Attributes:
        mode: what the requests ask for.
        concurrency: requests in flight at any time.
        repeat: 0, 1, ...; runs of the same repeat are neighbours in time and compared with each other.
            WARM_UP is not counted.
        seed: of images and texts; no two runs share one, so no cache can answer.
    """

    mode: Mode
    concurrency: int
    repeat: int
    seed: int

    def __str__(self) -> str:
        part = "warm-up" if self.repeat == WARM_UP else f"repeat {self.repeat + 1}"
        return f"concurrency {self.concurrency}, {self.mode}, {part}"


def schedule(modes: Sequence[Mode], concurrencies: Sequence[int], repeats: int, seed: int) -> list[RunSpec]:
    """All runs in order: modes side by side, their order turned around in every other set.

    A machine that slows down or speeds up meanwhile then touches all modes alike.
    """
    specs: list[RunSpec] = []
    for number, (repeat, concurrency) in enumerate(itertools.product(range(repeats), concurrencies)):
        # One flip more per repeat, or with two concurrencies each would always see the same order.
        flipped = (number + repeat * (len(concurrencies) + 1)) % 2 == 1
        for mode in reversed(modes) if flipped else modes:
            specs.append(RunSpec(mode, concurrency, repeat, seed + len(specs)))
    return specs


@dataclass(frozen=True)
class Run:
    """The numbers of one run.

    Tokens are means per request; `kv_peak_tokens` is the memory all requests in flight held at once, in
    tokens with the KV of all layers. `prefix_hit_tokens` and `image_hits` count what caches answered: both
    should be 0. `outcomes` counts images that the server localized.
    """

    spec: RunSpec
    requests: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    prompt_tokens: float
    output_tokens: float
    kv_peak_blocks: int
    kv_peak_tokens: float
    kv_samples: int
    prefix_hit_tokens: float
    image_hits: float
    ttfts_ms: tuple[float, ...]
    outcomes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_result(
        cls,
        spec: RunSpec,
        result: Mapping[str, Any],
        kv: KVUsage,
        prefix_hit_tokens: float = 0.0,
        image_hits: float = 0.0,
        outcomes: Mapping[str, int] | None = None,
    ) -> Self:
        """Read what `vllm bench serve --save-detailed` returns.

        Raises:
            RunError: requests failed.
        """
        if result["failed"] or not result["completed"]:
            errors = next((error for error in result.get("errors", ()) if error), "no error text")
            raise RunError(
                f"{spec}: {result['failed']} requests failed, the first one with: {errors.strip()}"
            )
        requests = result["completed"]
        return cls(
            spec=spec,
            requests=requests,
            duration_s=result["duration"],
            requests_per_s=result["request_throughput"],
            output_tokens_per_s=result["output_throughput"],
            ttft_p50_ms=result["median_ttft_ms"],
            ttft_p99_ms=result["p99_ttft_ms"],
            tpot_p50_ms=result["median_tpot_ms"],
            prompt_tokens=result["total_input_tokens"] / requests,
            output_tokens=result["total_output_tokens"] / requests,
            kv_peak_blocks=kv.peak_blocks,
            kv_peak_tokens=kv.peak_tokens,
            kv_samples=kv.samples,
            prefix_hit_tokens=prefix_hit_tokens,
            image_hits=image_hits,
            ttfts_ms=tuple(round(1000 * seconds, 1) for seconds in result["ttfts"]),
            outcomes=dict(outcomes or {}),  # asdict cannot copy a Counter
        )
