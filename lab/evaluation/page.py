# SPDX-License-Identifier: Apache-2.0
"""The page: everything in one HTML file that needs nothing else."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from lab.evaluation.report import (
    Report,
    describe_configurations,
    describe_localizer,
    interval,
    table_cells,
)
from lab.evaluation.summary import Row
from lab.evaluation.thresholds import ThresholdRow
from lab.tinyvqa.questions import FAMILIES

COLUMNS = (
    *("method", "rate", "tokens: local / all", "local %", "retained %", "all %", "retained %", "TTFT ms"),
    *("tokens with localizer", "localizer's steps", "prefill work", "KV tokens", *FAMILIES, "engine"),
)


def write_page(path: Path, report: Report, curves: Path) -> None:
    """Write the page with the curves inside."""
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.jinja")
    notes = [*report.notes, *([describe_localizer(report.localizer)] if report.localizer else [])]
    impossible = [
        f"{row.condition.row} at {row.condition.pruning_rate:g}: {row.impossible}"
        for row in report.rows
        if row.impossible
    ]
    page = template.render(
        curves=base64.b64encode(curves.read_bytes()).decode(),
        notes=notes,
        impossible=impossible,
        results=Table("", COLUMNS, [row_cells(row) for row in report.rows]),
        configurations=describe_configurations(report),
        tables=[table for table in _further_tables(report) if table.rows],
        provenance=json.dumps(report.provenance, indent=2),
    )
    path.write_text(page + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def equal_cost_table(report: Report) -> Table:
    """CROP beside what others do with as many tokens, the localizer's pass included."""
    headings = ("CROP", "rate", "tokens", "against", "rate", "tokens", "more right answers, points", "p")
    rows = [
        [
            *(one.method, f"{one.rate:g}", f"{one.tokens:.0f}"),
            *(one.against, f"{one.against_rate:g}", f"{one.against_tokens:.0f}"),
            *(interval(one.gained), "< 0.001" if one.chance < 0.001 else f"{one.chance:.3f}"),
        ]
        for one in report.equal_cost
    ]
    return Table("At equal cost, local questions (p by McNemar, corrected by Holm)", headings, rows)


def _further_tables(report: Report) -> Iterator[Table]:
    yield equal_cost_table(report)
    margins = [_margin_cells(report, index) for index in range(len(report.margins))]
    headings = ("CROP", "rate", "against", "more right answers, points")
    yield Table("CROP's margin on local questions", headings, margins)
    columns = ("CROP", "rate", "whole below", "regions used", *COLUMNS[2:6])
    thresholds = [_threshold_cells(row) for row in report.thresholds]
    yield Table("Doubtful regions: the whole image below a confidence", columns, thresholds)
    same = [[one.condition.slug, one.engine, f"{one.same} of {one.asked}"] for one in report.agreements]
    yield Table(
        "Answers that plain transformers give too, word for word", ("condition", "engine", "the same"), same
    )


def row_cells(row: Row) -> list[str]:
    """A row under COLUMNS, as text."""
    cells = table_cells(row)
    if row.impossible:
        return [*cells, *[""] * (len(COLUMNS) - len(cells))]
    families = [f"{100 * row.families[family].value:.1f}" for family in FAMILIES]
    kv = f"{row.groups['all'].kv_tokens:.0f}"
    return [*cells, *_localizer_cells(row), _work_cell(row), kv, *families, row.engine]


def _localizer_cells(row: Row) -> tuple[str, str]:
    """Visual tokens of both passes, and the steps of the localizer; nothing where it was not asked."""
    local, every = row.groups["local"], row.groups["all"]
    if not local.localizer_tokens or not every.localizer_tokens:
        return "", ""
    return (
        f"{local.total_tokens:.0f} / {every.total_tokens:.0f}",
        "" if every.localizer_steps is None else f"{every.localizer_steps:.1f}",
    )


def _work_cell(row: Row) -> str:
    """Of local and of all questions; nothing where nobody knows."""
    shares = [row.groups[name].prefill_work for name in ("local", "all")]
    return " / ".join(f"{share:.2f}x" for share in shares if share is not None)


def _margin_cells(report: Report, index: int) -> list[str]:
    margin = report.margins[index]
    return [margin.method, f"{margin.pruning_rate:g}", margin.against, interval(margin.gained)]


def _threshold_cells(row: ThresholdRow) -> list[str]:
    local, every = row.groups["local"], row.groups["all"]
    return [
        row.method,
        f"{row.pruning_rate:g}",
        f"{row.whole_below:g}",
        f"{100 * row.used:.0f} %",
        f"{local.visual_tokens:.0f} / {every.visual_tokens:.0f}",
        interval(local.accuracy),
        interval(local.retained),
        interval(every.accuracy),
    ]
