# SPDX-License-Identifier: Apache-2.0
"""What `vllm-crop bench --decode` prints and saves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_crop.benchmarking.decode import OUTPUT_LEN, SIZE, Case, DecodeOutcome, StepTimes
from vllm_crop.benchmarking.report import ratio_text
from vllm_crop.benchmarking.summary import Ratio


@dataclass(frozen=True)
class StepSummary:
    """Steps of one case with `running` requests: medians over repeats, ratio and difference to stock vLLM."""

    case: Case
    running: int
    median_ms: float
    p90_ms: float
    ratio: Ratio
    added_ms: float


def summarize_steps(steps: Sequence[StepTimes]) -> list[StepSummary]:
    """One summary per number of running requests and case, each repeat against stock vLLM's."""
    found = []
    for running in dict.fromkeys(one.running for one in steps):
        runs = [one for one in steps if one.running == running]
        stock = {one.repeat: one.median_ms for one in runs if one.case == "stock"}
        for case in get_args(Case):
            chosen = [one for one in runs if one.case == case]
            ratios = [one.median_ms / stock[one.repeat] for one in chosen]
            found.append(
                StepSummary(
                    case,
                    running,
                    median(one.median_ms for one in chosen),
                    median(one.p90_ms for one in chosen),
                    Ratio(median(ratios), min(ratios), max(ratios)),
                    median(one.median_ms - stock[one.repeat] for one in chosen),
                )
            )
    return found


def decode_json(outcome: DecodeOutcome, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The setting, the summary and every run."""
    summary = [asdict(one) for one in summarize_steps(outcome.steps)]
    return {"provenance": origin, "summary": summary, **asdict(outcome)}


def print_decode(console: Console, outcome: DecodeOutcome) -> None:
    """The table, the host's part, and how to read both."""
    machine = outcome.machine
    layers = ", ".join(f"{len(list(same))} x {count}" for count, same in groupby(outcome.tokens_per_layer))
    repeats = len({one.repeat for one in outcome.steps})
    console.print(
        f"Dummy LLaVA, {SIZE.layers} layers of {SIZE.hidden}; {machine.device}, {machine.cores} CPU cores, "
        f"load average {machine.load_before:.1f} before the start.\n"
        f"evicting: image prompts, tokens by layer {layers}, plc+ilp, {outcome.num_groups} KV cache groups. "
        f"stock and prepared: {outcome.text_tokens} text tokens, on plain vLLM and on the engine prepared "
        f"for eviction. {OUTPUT_LEN} output tokens."
    )
    console.print("", step_table(summarize_steps(outcome.steps)), "")
    for view in outcome.views:
        console.print(
            f"Late view of a step, {view.running} running: {view.median_us:.0f} us "
            f"({view.p10_us:.0f}-{view.p90_us:.0f})"
        )
    console.print(
        f"Engine steps in which all requests generate a token: medians of {repeats} runs that took turns, "
        "ratios of neighbouring runs with smallest to largest. The late view is numpy on the host, part of "
        "each such step: median, 10 to 90 percent of the calls."
    )


def step_table(summaries: Sequence[StepSummary]) -> Table:
    """A row per number of running requests and case."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for title in ("running", "engine", "step ms\nmedian", "step ms\np90", "median\n/ stock", "added\nms"):
        shown.add_column(title, justify="left" if title == "engine" else "right", no_wrap=True)
    for one in summaries:
        against = ("", "") if one.case == "stock" else (ratio_text(one.ratio), f"{one.added_ms:+.2f}")
        shown.add_row(str(one.running), one.case, f"{one.median_ms:.2f}", f"{one.p90_ms:.2f}", *against)
    return shown
