# SPDX-License-Identifier: Apache-2.0
"""What eviction costs while answers are generated: engine steps with and without it, and the host's part of
a step alone."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from statistics import median, quantiles
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console

from vllm_crop.benchmarking import decode_engine
from vllm_crop.benchmarking.dummy_llava import DummySize, make_checkpoint
from vllm_crop.benchmarking.load import Client
from vllm_crop.benchmarking.options import Options
from vllm_crop.benchmarking.runs import RunError
from vllm_crop.benchmarking.session import progress_bar
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.eviction.prompt_eviction import from_leaving_stages
from vllm_crop.eviction.stage_inputs import RunningEvictions
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.measuring.provenance import Machine, describe_machine

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


SIZE = DummySize(layers=8)  # so small that a step is mostly overhead
PRUNING_RATE = 0.889  # short in KV: 64 of 576 tokens on average
RUNNING = (1, 8, 64)
VIEWS_RUNNING = (1, 8, 64, 256)
OUTPUT_LEN = 64

# Text on stock vLLM, the same on an engine prepared for eviction, and pruned images on that one.
Case = Literal["stock", "prepared", "evicting"]


@dataclass(frozen=True)
class StepTimes:
    """The engine steps of one run in which all of `running` requests generated a token."""

    case: Case
    running: int
    repeat: int
    steps: int
    median_ms: float
    p90_ms: float


@dataclass(frozen=True)
class DecodeOutcome:
    """Everything that was measured.

    Attributes:
        num_groups: KV cache groups of the engine prepared for eviction.
        tokens_per_layer: of an evicting request's prompt.
        text_tokens: of the others' prompts, as much KV as the evicting requests have.
    """

    machine: Machine
    num_groups: int
    tokens_per_layer: tuple[int, ...]
    text_tokens: int
    steps: tuple[StepTimes, ...]
    views: tuple[ViewTimes, ...]


def measure_decode(options: Options, console: Console) -> DecodeOutcome:
    """Start two engines and let them take turns; then time the host's part alone.

    Raises:
        CropError: the model cannot evict at these layers, or an engine ended.
    """
    options = replace(options, methods=("plc+ilp",), pruning_rate=PRUNING_RATE)
    with _engines(options, console) as (clients, machine, tokens_per_layer):
        text_tokens = round(sum(tokens_per_layer) / len(tokens_per_layer))
        text = decode_engine.text_prompt(text_tokens)
        image = decode_engine.image_prompt(options.extra_body("plc+ilp")["crop"])
        prompts = {"stock": text, "prepared": text, "evicting": image}
        steps = _measure(options.repeats, clients, prompts, console)
    groups = predict_grouping(SIZE.layers, options.stages, block_size=1).groups
    views = time_views(VIEWS_RUNNING, len(options.stages))
    return DecodeOutcome(machine, len(groups), tokens_per_layer, text_tokens, steps, views)


@contextmanager
def _engines(
    options: Options, console: Console
) -> Iterator[tuple[dict[Case, Client], Machine, tuple[int, ...]]]:
    """Per case the process of its engine; the machine; and an evicting prompt's tokens by layer."""
    env, logs = decode_engine.ENVIRONMENT, options.folder
    with (
        Client(logs / "decode_stock.log", env) as stock,
        Client(logs / "decode_evicting.log", env) as evicting,
    ):
        with console.status("starting two small engines"):
            machine = stock.call(describe_machine)
            model = stock.call(make_checkpoint, options.folder / "decode_model", SIZE, weights=False)
            planned = options.plan("plc+ilp", load_geometry(str(model))).tokens_per_layer(SIZE.layers)
            most, config = max(RUNNING), {"eviction_layers": list(options.stages)}
            _call(stock, decode_engine.start, model, machine.is_cpu, most, None)
            _call(evicting, decode_engine.start, model, machine.is_cpu, most, config)
        tokens_per_layer = tuple(len(decode_engine.QUESTION) + count for count in planned)
        yield {"stock": stock, "prepared": evicting, "evicting": evicting}, machine, tokens_per_layer


def _measure(
    repeats: int, clients: Mapping[Case, Client], prompts: Mapping[str, dict[str, Any]], console: Console
) -> tuple[StepTimes, ...]:
    found: list[StepTimes] = []
    runs = [(-1, max(RUNNING)), *product(range(repeats), RUNNING)]  # a warm-up first
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(runs) * len(clients))
        for number, (repeat, running) in enumerate(runs):
            cases: tuple[Case, ...] = get_args(Case)
            for case in reversed(cases) if number % 2 else cases:
                progress.update(task, description=f"{running} running, {case}")
                prompt = [prompts[case]] * running
                seconds = _call(clients[case], decode_engine.time_steps, prompt, OUTPUT_LEN)
                progress.advance(task)
                if repeat >= 0:
                    times = [1000 * second for second in seconds]
                    p90 = quantiles(times, n=10)[-1]
                    found.append(StepTimes(case, running, repeat, len(times), median(times), p90))
    return tuple(found)


def _call(client: Client, function: Any, *args: Any) -> Any:
    try:
        return client.call(function, *args)
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"the engine failed: {error}; see {client.log_path}") from error
