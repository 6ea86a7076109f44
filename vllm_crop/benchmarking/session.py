# SPDX-License-Identifier: Apache-2.0
"""A whole benchmark: model, server, warm-up, runs, report."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_crop.benchmarking.kv import KVCapacity, KVSampler, metric_sum
from vllm_crop.benchmarking.load import Client, bench_arguments, run_bench
from vllm_crop.benchmarking.machine import Machine, describe_machine
from vllm_crop.benchmarking.prefill import ModelShape, read_shape
from vllm_crop.benchmarking.runs import WARM_UP, Mode, Run, RunError, RunSpec, schedule
from vllm_crop.benchmarking.server import Server, get_text, log_tail, serve
from vllm_crop.dummy_llava import BENCH, make_checkpoint
from vllm_crop.geometry import Region

# Both are polled several times a second.
QUIET = ("--disable-access-log-for-endpoints", "/health,/metrics")
MAX_MODEL_LEN = 2048
CPU_KV_GIB = 2


@dataclass(frozen=True)
class Options:
    """What the command line decides; `model` None is the dummy model."""

    model: str | None
    region: Region
    pruning_rate: float
    concurrencies: tuple[int, ...]
    num_prompts: int
    repeats: int
    output_len: int
    seed: int
    stock: bool
    serve_args: tuple[str, ...]
    folder: Path

    def extra_body(self, mode: Mode) -> dict[str, Any]:
        """What a request of this mode carries besides prompt and image."""
        if mode == "stock":
            return {}
        if mode == "off":
            return {"crop": {"method": "off"}}
        return {"crop": {"regions": [self.region.as_lists()], "pruning_rate": self.pruning_rate}}


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    machine: Machine
    shape: ModelShape | None
    capacity: KVCapacity
    server_commands: tuple[tuple[str, ...], ...]
    runs: tuple[Run, ...]


def run_benchmark(options: Options, console: Console) -> Outcome:
    """Serve, warm up, measure, stop.

    Raises:
        CropError: server or load generator failed; the message says how and where the log is.
    """
    with Client(options.folder / "client.log") as client:
        with console.status("loading vLLM"):
            machine = client.call(describe_machine)
            model, args, env = _what_to_serve(options, machine, client)
            shape = None
            with suppress(Exception):  # a model transformers does not know by itself: only the ideal is lost
                shape = client.call(read_shape, model)
        args = (*QUIET, *args)
        log_path = options.folder / "server.log"
        with serve(model, "--plugin", "crop", *args, log_path=log_path, env=env, console=console) as server:
            capacity = KVCapacity.of_server(server.base_url)
            runs = _measure(options, ("off", "plc"), server, capacity, client, console)
            commands = [server.command]
        if options.stock:
            log_path = options.folder / "stock_server.log"
            with serve(model, *args, log_path=log_path, env=env, console=console) as server:
                capacity_stock = KVCapacity.of_server(server.base_url)
                runs += _measure(options, ("stock",), server, capacity_stock, client, console)
                commands.append(server.command)
    return Outcome(machine, shape, capacity, tuple(commands), tuple(runs))


def _what_to_serve(
    options: Options, machine: Machine, client: Client
) -> tuple[str, tuple[str, ...], dict[str, str]]:
    if options.model is not None:
        return options.model, options.serve_args, {}
    model = str(client.call(make_checkpoint, options.folder / "model", BENCH, weights=False))
    args = ["--load-format", "dummy", "--max-model-len", str(MAX_MODEL_LEN)]
    # The dummy's vocabulary is so small that random questions begin alike now and then. The prefix cache
    # would answer those beginnings, a larger share of the pruned prompts.
    args.append("--no-enable-prefix-caching")
    env = {}
    if machine.is_cpu:
        # Compiling takes a minute longer and gains 5 percent; blocks as small as the CPU allows show KV use
        # most exactly.
        args += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
        env["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_GIB))
    return model, (*args, *options.serve_args), env


def _measure(
    options: Options,
    modes: Sequence[Mode],
    server: Server,
    capacity: KVCapacity,
    client: Client,
    console: Console,
) -> list[Run]:
    specs = schedule(modes, options.concurrencies, options.repeats, options.seed)
    most = max(options.concurrencies)
    # The first requests in each mode pay for kernels, allocations and thread pools.
    warm_ups = [RunSpec(mode, most, WARM_UP, options.seed + len(specs) + i) for i, mode in enumerate(modes)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(warm_ups) + len(specs))
        for spec in warm_ups:
            progress.update(task, description=str(spec))
            _run(options, spec, most, server, capacity, client)
            progress.advance(task)
        for spec in specs:
            progress.update(task, description=str(spec))
            run = _run(options, spec, options.num_prompts, server, capacity, client)
            runs.append(run)
            progress.advance(task)
            numbers = f"{run.requests_per_s:.2f} req/s, TTFT p50 {run.ttft_p50_ms:.0f} ms"
            progress.console.print(f"{spec} of {options.repeats}: {numbers}")
    return runs


def _run(
    options: Options, spec: RunSpec, num_prompts: int, server: Server, capacity: KVCapacity, client: Client
) -> Run:
    arguments = bench_arguments(spec, server, num_prompts, options.output_len, options.extra_body(spec.mode))
    try:
        before = get_text(f"{server.base_url}/metrics")
        with KVSampler(server.base_url, capacity) as sampler:
            result = client.call(run_bench, arguments)
        after = get_text(f"{server.base_url}/metrics")
        hits = [
            metric_sum(after, name) - metric_sum(before, name)
            for name in ("vllm:prefix_cache_hits_total", "vllm:mm_cache_hits_total")
        ]
        return Run.from_result(spec, result, sampler.usage(), *hits)
    except (OSError, RunError) as error:
        raise RunError(
            f"{error}\nThe load generator's log is {client.log_path}. "
            f"The end of the server's, {server.log_path}:\n{log_tail(server.log_path)}"
        ) from None
