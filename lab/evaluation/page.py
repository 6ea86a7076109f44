# SPDX-License-Identifier: Apache-2.0
"""The page: everything in one HTML file that needs nothing else."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from lab.evaluation.report import Report, describe_localizer, interval, table_cells
from lab.evaluation.summary import Row
from lab.evaluation.thresholds import ThresholdRow
from lab.tinyvqa.questions import FAMILIES

COLUMNS = (
    *("method", "rate", "tokens: local / all", "local %", "retained %", "all %", "retained %", "TTFT ms"),
    *("KV tokens", *FAMILIES, "engine", "ms / question"),
)
NOTES = (
    "Exact match of the whole answer. In brackets: 95 % intervals, Wilson for accuracy, paired for retention "
    "(accuracy as a share of the unpruned model's on the same questions) and for margins.",
    "local: read, relation and compare, which can be answered from a region. all: with search and count, "
    "whose honest region is the whole image; where a source says so, the image is served unpruned, and its "
    "tokens count. The same router in front of any other method would give it those answers too.",
    "Tokens are visual tokens of the answering pass, averaged over decoder layers and questions. What the "
    "localizer costs is in no row, so budgets are not equal: a region that the model finds itself takes 64 "
    "more visual tokens through all layers, the question once more, and a decode step for each token said. "
    "Compare a localizer's row with others at 64 tokens more. KV tokens count the whole prompt.",
    "CROP plc, whole, uses no region: the image is pooled evenly. It is the first to compare with at the "
    "same tokens; the margins leave it out.",
    "Rivals are implemented here. DivPrune, VisionZip and, nearly, CDPruner are what their authors' code "
    "does. FastV, PyramidDrop, SparseVLM and VTW prune at layers that follow from the budget and were not "
    "tuned, SparseVLM without recycling; IVC-Prune departs from its authors' formula. Their rows say what "
    "these settings give and not what the methods can do. Neighbour novelty is a baseline of our own.",
    "Scenes are aligned with the localizer's grid and, at 0.889, with the pools: a thing fills a cell of "
    "both. Cells of equal tokens are kind to pooling and to keeping every third token; the smallest error "
    "of a region misses all of a thing.",
    "In its last phase of training the checkpoint saw pictures with fewer tokens: half of them as CROP plc "
    "leaves them with the true region, half with all of the true region and a random part of the rest. The "
    "test set of seed 0 was looked at while it was trained. Other sizes (iso-token resize) and two images "
    "(thumb + crop) it has never seen: the first is no valid control, the second untrained.",
    "Times per question are those of this harness, which shares work between questions and does not ask "
    "twice what is served unpruned. TTFT is of the engine, one request at a time, without the localizer's "
    "own request.",
    "What these numbers show and what they do not: docs/accuracy.md in the repository.",
)


def write_page(path: Path, report: Report, curves: Path) -> None:
    """Write the page with the curves inside."""
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.jinja")
    notes = [*NOTES, *([describe_localizer(report.localizer)] if report.localizer else [])]
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


def _further_tables(report: Report) -> Iterator[Table]:
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
    pace = f"{1e3 * row.seconds_per_question:.1f}"
    return [*cells, f"{row.groups['all'].kv_tokens:.0f}", *families, row.engine, pace]


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
