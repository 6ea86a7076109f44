# SPDX-License-Identifier: Apache-2.0
"""What an evaluation prints and writes: a table, JSON, curves and one page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lab.evaluation.comparisons import Agreement, EqualCost, Margin, equal_cost, margins
from lab.evaluation.curves import draw_curves
from lab.evaluation.localizer_score import LocalizerScore, score_localizer
from lab.evaluation.prefill_work import PrefillWork
from lab.evaluation.questions import TestScene
from lab.evaluation.rivals.names import ONLY
from lab.evaluation.stats import Estimate
from lab.evaluation.store import ConditionResult
from lab.evaluation.summary import Row, summarize
from lab.evaluation.thresholds import ThresholdRow, sweep
from lab.evaluation.times import Times
from vllm_crop.benchmarking.report import write_json

_SHORT_COLUMNS = {"rate": 5, "tokens": 6, "local %": 10, "retained %": 10, "all %": 10, "TTFT ms": 11}


@dataclass(frozen=True)
class Report:
    """Everything a reader needs; `provenance` holds versions, revision, command and settings."""

    rows: tuple[Row, ...]
    margins: tuple[Margin, ...]
    equal_cost: tuple[EqualCost, ...]
    agreements: tuple[Agreement, ...]
    localizer: LocalizerScore | None
    thresholds: tuple[ThresholdRow, ...]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def make_report(
    scenes: Sequence[TestScene],
    results: Sequence[ConditionResult],
    agreed: Sequence[Agreement],
    provenance: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    times: Times | None = None,
    work: PrefillWork | None = None,
) -> Report:
    """Work out all numbers."""
    return Report(
        tuple(summarize(scenes, results, times, work)),
        tuple(margins(scenes, results)),
        tuple(equal_cost(scenes, results)),
        tuple(agreed),
        score_localizer(scenes, results, times),
        tuple(sweep(scenes, results)),
        provenance,
        notes,
    )


def write_report(folder: Path, report: Report) -> None:
    """`results.json`, `curves.png`, `index.html` and `README.md`."""
    from lab.evaluation.markdown import write_markdown
    from lab.evaluation.page import write_page

    numbers = {
        "provenance": report.provenance,
        "notes": report.notes,
        "localizer": report.localizer and asdict(report.localizer),
        "thresholds": [asdict(row) for row in report.thresholds],
        "rows": [{"row": row.condition.row, **asdict(row)} for row in report.rows],
        "margins": [asdict(margin) for margin in report.margins],
        "equal_cost": [asdict(one) for one in report.equal_cost],
        "agreements": [asdict(one) for one in report.agreements],
    }
    write_json(folder / "results.json", numbers)
    draw_curves(report.rows, folder / "curves.png", report.localizer.ms if report.localizer else None)
    write_page(folder / "index.html", report, folder / "curves.png")
    write_markdown(folder / "README.md", report)


def print_report(console: Console, report: Report) -> None:
    """The table on a terminal."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for title, width in _SHORT_COLUMNS.items():
        shown.add_column(title, justify="right", no_wrap=True, min_width=width)
    for row in report.rows:
        shown.add_row(*_short_cells(row))
    console.print(shown)
    if report.localizer:
        console.print(describe_localizer(report.localizer), markup=False)


def _short_cells(row: Row) -> list[str]:
    """What fits a terminal; exact intervals are on the page."""
    name, rate, *_, ttft = table_cells(row)
    if row.impossible:
        return [name, rate, "", "impossible", *[""] * 3]
    local, every = row.groups["local"], row.groups["all"]
    shares = [local.accuracy, local.retained, every.accuracy]
    found = f"+{local.localizer_tokens:.0f}" if local.localizer_tokens else ""
    return [name, rate, f"{local.visual_tokens:.0f}{found}", *map(_short, shares), ttft]


def _short(estimate: Estimate | None) -> str:
    """In percent, with the larger half of the interval."""
    if estimate is None:
        return "-"
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    return f"{100 * estimate.value:.1f} ±{100 * half:.1f}"


def table_cells(row: Row) -> list[str]:
    """A row as text: name, rate, tokens, accuracy and retention of local and of all questions, TTFT."""
    rate = "" if row.condition.pruning_rate is None else f"{row.condition.pruning_rate:g}"
    if row.impossible:
        return [row.condition.row, rate, "impossible", *[""] * 5]
    local, every = row.groups["local"], row.groups["all"]
    return [
        row.condition.row,
        rate,
        f"{local.visual_tokens:.0f} / {every.visual_tokens:.0f}",
        interval(local.accuracy),
        interval(local.retained),
        interval(every.accuracy),
        interval(every.retained),
        "" if row.ttft_ms is None else f"{row.ttft_ms:.0f} ({row.ttft_share:.2f}x)",
    ]


def interval(estimate: Estimate | None) -> str:
    """In percent."""
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


def describe_configurations(report: Report) -> list[str]:
    """In words, which configuration each rival ran in at which rate, of how many tried."""
    tried = (report.provenance.get("tuning") or {}).get("tried", {})
    by_method: dict[str, list[str]] = {}
    for row in report.rows:
        one = row.condition
        if one.configuration not in (None, ONLY):
            number = tried.get(f"{one.method} {one.pruning_rate:g}")
            of = f" (of {number})" if number else ""
            by_method.setdefault(one.row, []).append(f"{one.configuration}{of} at {one.pruning_rate:g}")
    return [f"{name}: {'; '.join(each)}" for name, each in by_method.items()]


def describe_localizer(score: LocalizerScore) -> str:
    """In words."""
    time = (
        "" if score.ms is None else f" A request takes {score.ms:.0f} ms, which come before the TTFT below."
    )
    if score.steps is not None:
        time += f" It has {score.visual_tokens:.0f} visual tokens and says {score.steps:.1f}."
    return (
        f"Localizer: covers the minimal region of {interval(score.covered)} % of local questions "
        f"({100 * score.coverage:.1f} % of its cells) with {100 * score.area:.1f} % of the image; says the "
        f"whole image to {interval(score.whole)} % of search and count; {score.unreadable} of {score.asked} "
        f"answers were no location.{time}"
    )
