# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints and saves."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_crop.benchmarking.kv import SAMPLE_INTERVAL_S
from vllm_crop.benchmarking.prefill import prefill_flops
from vllm_crop.benchmarking.session import Options, Outcome
from vllm_crop.benchmarking.summary import Ratio, Summary, mean_prompt_tokens, summarize

# Field of Run -> column title and decimals.
COLUMNS = {
    "requests_per_s": ("req/s", 2),
    "output_tokens_per_s": ("output\ntok/s", 1),
    "ttft_p50_ms": ("TTFT p50\nms", 0),
    "ttft_p99_ms": ("TTFT p99\nms", 0),
    "kv_peak_blocks": ("KV peak\nblocks", 0),
    "kv_tokens": ("KV tokens\na request", 0),
}


def print_report(console: Console, options: Options, outcome: Outcome, origin: Mapping[str, Any]) -> None:
    """The setting, the table, and how to read it."""
    heading = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _heading(options, outcome, origin):
        heading.add_row(name, Text(value))
    notes = Table.grid(padding=(0, 1, 0, 0))
    for note in _notes(options, outcome):
        notes.add_row("-", Text(note))
    console.print(heading, "", table(summarize(outcome.runs)), "", notes)


def table(summaries: Sequence[Summary]) -> Table:
    """A row per concurrency and mode, and one per comparison with its spread below."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column("in\nflight", justify="right", no_wrap=True)
    shown.add_column("mode", no_wrap=True)
    for title, _ in COLUMNS.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for summary in summaries:
        for mode, values in summary.medians.items():
            numbers = [f"{values[field]:.{digits}f}" for field, (_, digits) in COLUMNS.items()]
            shown.add_row(str(summary.concurrency), mode, *numbers)
        for pair, ratios in summary.ratios.items():
            shown.add_row(
                "", pair.replace("/", " / "), *(_ratio_text(ratios[f]) for f in COLUMNS), style="bold"
            )
        shown.add_section()
    return shown


def write_report(path: Path, options: Options, outcome: Outcome, origin: Mapping[str, Any]) -> None:
    """Write the setting, the summary and every single run as JSON, all at once or not at all."""
    report = {
        "provenance": origin,
        **_setting(options, outcome),
        "summary": [asdict(summary) for summary in summarize(outcome.runs)],
        "runs": [asdict(run) for run in outcome.runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def _setting(options: Options, outcome: Outcome) -> dict[str, Any]:
    """What was served and asked for, as plain values for JSON."""
    return {
        "machine": asdict(outcome.machine),
        "model": _model_name(options),
        "shape": outcome.shape and asdict(outcome.shape),
        "kv": asdict(outcome.capacity),
        "ideal_prefill_flops_ratio": ideal_ratio(outcome),
        "server_commands": [list(command) for command in outcome.server_commands],
        "requests": {
            "region": options.region.as_lists(),
            "pruning_rate": options.pruning_rate,
            "num_prompts": options.num_prompts,
            "repeats": options.repeats,
            "output_len": options.output_len,
            "seed": options.seed,
        },
    }


def _ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    spread = f"\n{ratio.low:.2f}-{ratio.high:.2f}" if ratio.low < ratio.high else ""
    return f"{ratio.median:.2f}x{spread}"


def ideal_ratio(outcome: Outcome) -> float | None:
    """Prefill FLOPs of the language model, pruned over full; None for an unknown model."""
    if outcome.shape is None:
        return None
    tokens = mean_prompt_tokens(outcome.runs)
    return prefill_flops(outcome.shape, tokens["plc"]) / prefill_flops(outcome.shape, tokens["off"])


def _heading(options: Options, outcome: Outcome, origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    machine, tokens, versions = outcome.machine, mean_prompt_tokens(outcome.runs), origin["versions"]
    yield "model", _model_name(options) + (f", {outcome.shape}" if outcome.shape else "")
    busy = f"load average {machine.load_before:.1f} before the start"
    yield "machine", f"{machine.device}, {machine.cores} CPU cores, {busy}"
    yield "software", f"vLLM {versions.get('vllm', '?')}, vllm-crop {versions.get('vllm-crop', '?')}"
    yield (
        "requests",
        f"{tokens['off']:.0f} prompt tokens full, {tokens['plc']:.0f} pruned "
        f"(pruning rate {options.pruning_rate:.3f}), {options.output_len} output tokens; "
        f"{options.num_prompts} a run, {options.repeats} repeats",
    )


def _notes(options: Options, outcome: Outcome) -> Iterator[str]:
    yield (
        "Values are medians over repeats; ratios those of neighbouring runs, smallest to largest below. "
        f"The p99 of {options.num_prompts} requests is about the slowest one."
    )
    if options.stock:
        yield "The stock server ran after the other one: drift of the machine is part of off / stock."
    capacity = outcome.capacity
    yield (
        f"KV peak: blocks of {capacity.block_size} tokens that running requests held at once, of "
        f"{capacity.blocks}, sampled every {SAMPLE_INTERVAL_S} s from vllm:kv_cache_usage_perc. "
        "KV tokens: prompt and output."
    )
    if (ideal := ideal_ratio(outcome)) is not None:
        yield (
            f"On paper, prefill in the language model takes {ideal:.2f}x the FLOPs. Vision tower, decoding "
            "and HTTP take what they took."
        )
    if any(run.prefix_hit_tokens or run.image_hits for run in outcome.runs):
        yield "Caches answered parts of some requests: prefix_hit_tokens and image_hits in the JSON."


def _model_name(options: Options) -> str:
    return options.model or "dummy LLaVA with random weights"
