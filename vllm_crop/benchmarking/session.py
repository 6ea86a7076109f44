# SPDX-License-Identifier: Apache-2.0
"""A whole benchmark: model, servers, warm-up, runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_crop.benchmarking.kv import KVCapacity, KVSampler
from vllm_crop.benchmarking.load import Client, bench_arguments, run_bench
from vllm_crop.benchmarking.options import Options
from vllm_crop.benchmarking.prefill import Ideal, ModelShape, ideals, read_shape
from vllm_crop.benchmarking.runs import LOCALIZED_MODES, WARM_UP, Mode, Run, RunError, RunSpec, schedule
from vllm_crop.benchmarking.summary import mean_prompt_tokens
from vllm_crop.benchmarking.targets import Target, outcomes, started, what_to_serve
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.provenance import Machine, describe_machine
from vllm_crop.measuring.server import get_text, log_tail


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    machine: Machine
    shape: ModelShape
    capacities: dict[Mode, KVCapacity]
    ideals: dict[Mode, Ideal]
    server_commands: tuple[tuple[str, ...], ...]
    runs: tuple[Run, ...]


def progress_bar(console: Console) -> Progress:
    """What is running, how much of it is done, for how long; gone when all is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def run_benchmark(options: Options, console: Console) -> Outcome:
    """Serve, warm up, measure, stop.

    Raises:
        CropError: the model cannot be pruned like this, or server or load generator failed; the message says
            how and where the log is.
    """
    with Client(options.folder / "client.log") as client:
        with console.status("loading vLLM"):
            machine = client.call(describe_machine)
            to_serve = what_to_serve(options, machine, client)
        geometry = load_geometry(to_serve.model)
        modes = [mode for mode in options.modes if mode not in LOCALIZED_MODES]
        plans = {mode: options.plan(mode, geometry) for mode in modes}
        shape = client.call(read_shape, to_serve.model)
        with started(options, to_serve, geometry, client, console) as targets:
            runs = _measure(options, targets, client, console)
    per_layer = {mode: plan.tokens_per_layer(shape.layers) for mode, plan in plans.items()}
    text_tokens = mean_prompt_tokens(runs)["off"] - per_layer["off"][0]
    return Outcome(
        machine,
        shape,
        {mode: target.capacity for mode, target in targets.items()},
        ideals(shape, per_layer, text_tokens),
        tuple(dict.fromkeys(target.server.command for target in targets.values())),
        tuple(runs),
    )


def _measure(options: Options, targets: Mapping[Mode, Target], client: Client, console: Console) -> list[Run]:
    specs = schedule(options.modes, options.concurrencies, options.repeats, options.seed)
    most = max(options.concurrencies)
    # The first requests in each mode pay for kernels, allocations and thread pools.
    first_seed = options.seed + len(specs)
    warm_ups = [RunSpec(mode, most, WARM_UP, first_seed + i) for i, mode in enumerate(options.modes)]
    runs = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(warm_ups) + len(specs))
        for spec in warm_ups:
            progress.update(task, description=str(spec))
            _run(options, spec, most, targets[spec.mode], client)
            progress.advance(task)
        for spec in specs:
            progress.update(task, description=str(spec))
            run = _run(options, spec, options.num_prompts, targets[spec.mode], client)
            runs.append(run)
            progress.advance(task)
            numbers = f"{run.requests_per_s:.2f} req/s, TTFT p50 {run.ttft_p50_ms:.0f} ms"
            progress.console.print(f"{spec} of {options.repeats}: {numbers}")
    return runs


def _run(options: Options, spec: RunSpec, num_prompts: int, target: Target, client: Client) -> Run:
    server = target.server
    arguments = bench_arguments(
        spec, server, num_prompts, options.output_len, options.image_side, options.extra_body(spec.mode)
    )
    try:
        before = get_text(f"{server.base_url}/metrics")
        with KVSampler(server.base_url, target.capacity) as sampler:
            result = client.call(run_bench, arguments)
        after = get_text(f"{server.base_url}/metrics")
        hits = [
            metric_sum(after, name) - metric_sum(before, name)
            for name in ("vllm:prefix_cache_hits_total", "vllm:mm_cache_hits_total")
        ]
        localized = outcomes(after) - outcomes(before)
        return Run.from_result(spec, result, sampler.usage(), hits[0], hits[1], localized)
    except (OSError, RunError) as error:
        raise RunError(
            f"{error}\nThe load generator's log is {client.log_path}. "
            f"The end of the server's, {server.log_path}:\n{log_tail(server.log_path)}"
        ) from None
