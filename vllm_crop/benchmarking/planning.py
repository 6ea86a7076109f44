# SPDX-License-Identifier: Apache-2.0
"""What a plan costs: CPU time of `make_plan` by size and method, as servers make plans."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.families.llava_next import LLAVA_NEXT, LLAVA_ONEVISION, AnyResolution
from vllm_crop.planning.budget import BudgetError, Method
from vllm_crop.planning.geometry import Box, ImageTokens, Region, TokenGrid
from vllm_crop.planning.plan import Compression, make_plan, use_compiled

NUM_LAYERS = 32
SIZES: dict[str, ImageTokens] = {
    "24 x 24": TokenGrid(24, 24),
    "LLaVA-NeXT, 672 x 672 pixels": AnyResolution.from_settings({}, LLAVA_NEXT, 336, 24, None).tokens(
        672, 672
    ),
    "64 x 64": TokenGrid(64, 64),
    "LLaVA-OneVision, 2304 x 2304 pixels": AnyResolution.from_settings(
        {}, LLAVA_ONEVISION, 384, 27, None
    ).tokens(2304, 2304),
    "128 x 128": TokenGrid(128, 128),
}
METHODS: dict[str, tuple[Compression, Method, tuple[int, ...]]] = {
    "plc, pool": ("pool", "plc", ()),
    "plc, prune": ("prune", "plc", ()),
    "ilp": ("pool", "ilp", (2,)),
    "plc+ilp": ("pool", "plc+ilp", (2,)),
    "plc+ilp, 2": ("pool", "plc+ilp", (2, 16)),
}
REGIONS = (
    Region((Box(0.375, 0.375, 0.625, 0.625),)),
    Region((Box(0.301, 0.301, 0.302, 0.302),)),
    Region((Box(0.1, 0.1, 0.2, 0.35), Box(0.5, 0.6, 0.9, 0.7), Box(0.7, 0.1, 0.8, 0.8))),
    Region((Box(0.0, 0.0, 1.0, 0.97),)),
)
RATES = (0.5, 0.667, 0.778, 0.889)


@dataclass(frozen=True)
class PlanTimes:
    """CPU milliseconds that plans of one size and method took, of every region and rate alike."""

    size: str
    method: str
    times_ms: tuple[float, ...]


def measure_planning(repeats: int = 5) -> Iterator[PlanTimes]:
    """Plan every region at every rate, `repeats` times, never the same twice."""
    use_compiled()
    for size, method in itertools.product(SIZES, METHODS):
        plan_ms(size, method, REGIONS[0], RATES[0])  # what is made once
        cases = itertools.product(range(1, repeats + 1), REGIONS, RATES)
        # A digit that changes no plan, or the cache would answer.
        times = [plan_ms(size, method, region, rate + turn * 1e-12) for turn, region, rate in cases]
        yield PlanTimes(size, method, tuple(filter(None, times)))


def plan_ms(size: str, method: str, region: Region, rate: float) -> float | None:
    """CPU milliseconds of one plan; None if the rate cannot be met with the method's layers."""
    compression, name, layers = METHODS[method]
    start = time.thread_time()
    try:
        make_plan(SIZES[size], region, rate, compression, name, NUM_LAYERS, layers)
    except BudgetError:
        return None
    return 1000 * (time.thread_time() - start)


def planning_table(measured: Iterator[PlanTimes]) -> Table:
    """A row per size and method."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for title in ("tokens", "method"):
        table.add_column(title, no_wrap=True)
    for title in ("median", "min", "max", "plans"):
        table.add_column(title, justify="right", no_wrap=True, min_width=6)
    table.title = "CPU milliseconds of one plan"
    last = None
    for one in measured:
        if one.size != last and last is not None:
            table.add_section()
        times = one.times_ms
        numbers = [f"{value:.2f}" for value in (median(times), min(times), max(times))]
        table.add_row("" if one.size == last else one.size, one.method, *numbers, str(len(times)))
        last = one.size
    split_by = "compiled code" if use_compiled() else "numpy, without numba"
    table.caption = f"2: evicted at two layers. Tokens are split by {split_by}."
    return table
