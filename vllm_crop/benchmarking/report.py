# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints and saves."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_crop.benchmarking.kv import SAMPLE_INTERVAL_S
from vllm_crop.benchmarking.options import Options
from vllm_crop.benchmarking.prefill import Ideal
from vllm_crop.benchmarking.runs import Mode
from vllm_crop.benchmarking.session import Outcome
from vllm_crop.benchmarking.summary import Ratio, Summary, mean_prompt_tokens, summarize
from vllm_crop.benchmarking.targets import outcomes_by_mode

# Field of Run -> column title and decimals.
COLUMNS = {
    "requests_per_s": ("req/s", 2),
    "ttft_p50_ms": ("TTFT p50\nms", 0),
    "ttft_p99_ms": ("TTFT p99\nms", 0),
    "tpot_p50_ms": ("TPOT p50\nms", 1),
    "kv_peak_tokens": ("KV peak\ntokens", 0),
}


def table(summaries: Sequence[Summary], prepared: bool) -> Table:
    """A row per concurrency and mode, then one per comparison with its spread below."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column("in\nflight", justify="right", no_wrap=True)
    shown.add_column("mode", no_wrap=True)
    for title, _ in COLUMNS.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for summary in summaries:
        for mode, values in summary.medians.items():
            numbers = [f"{values[field]:.{digits}f}" for field, (_, digits) in COLUMNS.items()]
            shown.add_row(str(summary.concurrency), _label(mode, prepared), *numbers)
        for mode, ratios in summary.ratios.items():
            name = f"{mode} / {summary.reference}"
            shown.add_row("", name, *(ratio_text(ratios[field]) for field in COLUMNS), style="bold")
        shown.add_section()
    return shown


def ideal_table(summary: Summary, ideals: Mapping[Mode, Ideal], prepared: bool) -> Table:
    """What each mode takes of what the reference takes: on paper, and measured at one concurrency."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column(f"against {summary.reference},\n{summary.concurrency} in flight", no_wrap=True)
    for title in ("image tokens\nby layer", "prefill FLOPs\non paper", "TTFT p50", "KV on\npaper", "KV peak"):
        shown.add_column(title, justify="right", no_wrap=True)
    for mode, ratios in summary.ratios.items():
        if mode not in ideals:
            continue  # how much a localizer takes is no matter of arithmetic
        ideal = ideals[mode]
        runs = [(count, len(list(same))) for count, same in groupby(ideal.image_tokens_per_layer)]
        shown.add_row(
            _label(mode, prepared),
            ", ".join(f"{layers} x {count}" for count, layers in runs),
            f"{ideal.prefill_flops:.2f}x",
            ratio_text(ratios["ttft_p50_ms"]),
            f"{ideal.kv_tokens:.2f}x",
            ratio_text(ratios["kv_peak_tokens"]),
        )
    return shown


def ratio_text(ratio: Ratio | None) -> str:
    """The median, and the spread in a line below."""
    if ratio is None:
        return "-"
    spread = f"\n{ratio.low:.2f}-{ratio.high:.2f}" if ratio.low < ratio.high else ""
    return f"{ratio.median:.2f}x{spread}"


def _label(mode: Mode, prepared: bool) -> str:
    return "off, prepared" if mode == "off" and prepared else mode


def print_report(console: Console, options: Options, outcome: Outcome, origin: Mapping[str, Any]) -> None:
    """The setting, the table, and how to read it."""
    heading = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _heading(options, outcome, origin):
        heading.add_row(name, Text(value))
    notes = Table.grid(padding=(0, 1, 0, 0))
    for note in _notes(options, outcome):
        notes.add_row("-", Text(note))
    summaries = summarize(outcome.runs)
    prepared = bool(options.stages)
    console.print(heading, "", table(summaries, prepared), "")
    console.print(ideal_table(summaries[0], outcome.ideals, prepared), "", notes)


def write_report(path: Path, options: Options, outcome: Outcome, origin: Mapping[str, Any]) -> None:
    """Write the setting, the summary and every single run as JSON, all at once or not at all."""
    report = {
        "provenance": origin,
        **_setting(options, outcome),
        "ideals": {mode: asdict(ideal) for mode, ideal in outcome.ideals.items()},
        "summary": [asdict(summary) for summary in summarize(outcome.runs)],
        "runs": [asdict(run) for run in outcome.runs],
    }
    write_json(path, report)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def _setting(options: Options, outcome: Outcome) -> dict[str, Any]:
    """What was served and asked for, as plain values for JSON."""
    return {
        "machine": asdict(outcome.machine),
        "model": _model_name(options),
        "shape": asdict(outcome.shape),
        "kv": {mode: asdict(capacity) for mode, capacity in outcome.capacities.items()},
        "server_commands": [list(command) for command in outcome.server_commands],
        "requests": {
            "region": options.region.as_lists(),
            "pruning_rate": options.pruning_rate,
            "methods": options.methods,
            "eviction_layers": options.stages,
            "localizers": options.localizers,
            "localizer_config": dict(options.localizer_config),
            "num_prompts": options.num_prompts,
            "repeats": options.repeats,
            "output_len": options.output_len,
            "seed": options.seed,
        },
    }


def _heading(options: Options, outcome: Outcome, origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    machine, tokens, versions = outcome.machine, mean_prompt_tokens(outcome.runs), origin["versions"]
    yield "model", f"{_model_name(options)}, {outcome.shape}"
    busy = f"load average {machine.load_before:.1f} before the start"
    yield "machine", f"{machine.device}, {machine.cores} CPU cores, {busy}"
    yield "software", f"vLLM {versions.get('vllm', '?')}, vllm-crop {versions.get('vllm-crop', '?')}"
    prompts = ", ".join(f"{tokens[mode]:.0f} {mode}" for mode in options.modes)
    yield "requests", f"prompt tokens: {prompts}; {options.output_len} output tokens"
    evicting = f", eviction layers {list(options.stages)}" if options.stages else ""
    yield "pruning", f"rate {options.pruning_rate:.3f}{evicting}"
    yield "runs", f"{options.num_prompts} requests each, {options.repeats} repeats, modes in turn"


def _notes(options: Options, outcome: Outcome) -> Iterator[str]:
    yield (
        "Values are medians over repeats; ratios those of neighbouring runs, smallest to largest below. "
        f"The p99 of {options.num_prompts} requests is about the slowest one."
    )
    if options.stock:
        yield "stock: vLLM without the plugin, a server of its own. It was up all the time, as was the other."
    if options.stages:
        yield (
            "off, prepared: unpruned requests on the server that is prepared for eviction. Pruned ones are "
            "served by it too."
        )
    for mode, counts in outcomes_by_mode(outcome.runs).items():
        became = ", ".join(f"{count} {what}" for what, count in counts.most_common())
        yield (
            f"{mode}: {options.methods[0]} without a region in the request. TTFT includes finding it. "
            f"What became of the images: {became}; all but regions were served whole."
        )
    yield (
        "KV peak: memory that running requests held at once, in tokens with the KV of all layers, sampled "
        f"every {SAMPLE_INTERVAL_S} s from vllm:kv_cache_usage_perc. {_blocks_note(outcome)}"
    )
    yield (
        "On paper: the language model's prefill, and KV of the prompt without rounding up to blocks. Vision "
        "tower, decoding and HTTP take what they took."
    )
    if any(run.prefix_hit_tokens or run.image_hits for run in outcome.runs):
        yield "Caches answered parts of some requests: prefix_hit_tokens and image_hits in the JSON."


def _blocks_note(outcome: Outcome) -> str:
    served = {c.tokens_per_block: c for c in outcome.capacities.values()}
    sizes = " and ".join(
        f"{c.blocks} blocks of {c.tokens_per_block:.3g} such tokens" for c in served.values()
    )
    return f"The servers have {sizes}." if len(served) > 1 else f"There are {sizes}."


def _model_name(options: Options) -> str:
    return options.model or "dummy LLaVA with random weights"
