# SPDX-License-Identifier: Apache-2.0
"""The tables that a benchmark prints."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.benchmarking.prefill import Ideal
from vllm_crop.benchmarking.runs import Mode
from vllm_crop.benchmarking.summary import Ratio, Summary

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
