# SPDX-License-Identifier: Apache-2.0
"""The table as Markdown, to be kept beside the numbers."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.evaluation.page import COLUMNS, equal_cost_table, row_cells
from lab.evaluation.report import Report, describe_configurations, describe_localizer


def write_markdown(path: Path, report: Report) -> None:
    """Write notes, table and how it came about."""
    path.write_text("\n".join(_parts(report)) + "\n", encoding="utf-8")


def _parts(report: Report) -> Iterator[str]:
    yield "# Do answers survive pruning?\n\n![Accuracy against visual tokens](curves.png)\n"
    origin = report.provenance
    command = shlex.join(origin["command"])
    revisions = ", ".join(revision[:12] for revision in origin["revisions_of_conditions"])
    made = f"Made by `{command}`, conditions measured at {revisions}, in {origin['seconds'] / 60:.0f} minutes"
    yield f"{made}. Margins, thresholds and all settings are in `results.json`.\n"
    for note in report.notes:
        yield f"* {note}"
    if report.localizer:
        yield f"* {describe_localizer(report.localizer)}"
    yield ""
    yield _line(COLUMNS)
    yield "|" + "---|" * len(COLUMNS)
    for row in report.rows:
        yield _line(row_cells(row))
    yield ""
    for sentence in describe_configurations(report):
        yield f"* {sentence}"
    for row in report.rows:
        if row.impossible:
            yield f"* {row.condition.row} at {row.condition.pruning_rate:g}: {row.impossible}"
    compared = equal_cost_table(report)
    if compared.rows:
        yield f"\n## {compared.title}\n"
        yield _line(compared.headings)
        yield "|" + "---|" * len(compared.headings)
        yield from map(_line, compared.rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(condition.replace("|", "/") for condition in cells) + " |"
