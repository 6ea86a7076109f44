# SPDX-License-Identifier: Apache-2.0
"""Prints what was found, the worst first."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, Group
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from lab.drift.comparison import Finding, Verdict
from lab.drift.inventory import Change

_STYLES: dict[Verdict, str] = {
    "same": "green",
    "new": "yellow",
    "body changed": "yellow",
    "arguments changed": "bold yellow",
    "gone": "bold red",
    "not found": "bold red",
}
_ENDS = ("Nothing to do.", "Read what changed.", "Something breaks.")


@dataclass(frozen=True)
class Drift:
    """Everything that was found between two vLLMs."""

    findings: list[Finding]
    architectures: list[Change]
    requirements: list[Change]

    @property
    def severity(self) -> int:
        """The exit code: 0 nothing, 1 to be read, 2 breaks."""
        whole = int(bool(self.architectures or self.requirements))
        return max([whole, *(finding.severity for finding in self.findings)])


def print_drift(console: Console, drift: Drift, every: bool, diffs: bool) -> None:
    """Print the report.

    Args:
        every: what stayed the same is listed too, beside registered points.
        diffs: print how bodies changed.
    """
    points = [finding for finding in drift.findings if finding.relied.points]
    beside = [finding for finding in drift.findings if not finding.relied.points]
    _print_findings(console, "Registered points", points, True)
    _print_findings(console, "Relied on beside them", beside, every)
    if diffs:
        for finding in _worst_first(drift.findings):
            if finding.diff:
                _print_diff(console, finding)
    _print_changes(console, "Multimodal architectures", drift.architectures)
    _print_changes(console, "Requirements", drift.requirements)
    console.print(f"\n[bold]{_ENDS[drift.severity]}[/bold]")


def _worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: (-finding.severity, finding.verdict))


def _print_findings(console: Console, title: str, findings: list[Finding], every: bool) -> None:
    counts = Counter(finding.verdict for finding in findings)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if counts[verdict])
    console.print(f"\n[bold]{title}[/bold]: {said or 'none'}")
    table = Table(box=None, show_header=False, padding=(0, 1))
    for finding in _worst_first(findings):
        if every or finding.verdict != "same" or finding.broken:
            style = "bold red" if finding.broken else _STYLES[finding.verdict]
            table.add_row(Text(finding.verdict, style), _describe(finding))
    if table.row_count:
        console.print(table)


def _describe(finding: Finding) -> Group:
    lines = [Text(finding.relied.title, overflow="fold")]
    if finding.verdict == "same" and not finding.broken:
        return Group(*lines)
    for way, places in finding.relied.ways.items():
        shown = sorted(places)
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        label = "registered" if way == "point" else way
        lines.append(Text(f"  {label}: {', '.join(shown[:3])}{more}", "dim", overflow="fold"))
    if finding.broken:
        lines.append(Text(f"  {finding.broken}", "red"))
    if finding.verdict == "arguments changed":
        lines += [Text(f"  {sign} {text}") for sign, text in zip("-+", finding.detail, strict=True)]
    elif finding.verdict == "gone":
        went = ", ".join(finding.detail[:4])
        lines.append(Text(f"  now: {went}" if went else "  nothing of that name and kind is left"))
    elif finding.verdict == "not found":
        lines.append(Text("  neither vLLM has it, as far as can be read without importing"))
    return Group(*lines)


def _print_diff(console: Console, finding: Finding) -> None:
    console.print(f"\n[bold]{escape(finding.relied.title)}[/bold]")
    if console.is_terminal:
        console.print(Syntax(finding.diff, "diff", background_color="default", word_wrap=True))
    else:
        console.print(Text(finding.diff), soft_wrap=True)


def _print_changes(console: Console, title: str, changes: list[Change]) -> None:
    console.print(f"\n[bold]{title}[/bold]: {len(changes) or 'none'} changed")
    for change in changes:
        if change.old is None:
            console.print(Text(f"  new   {change.name}: {change.new}"))
        elif change.new is None:
            console.print(Text(f"  gone  {change.name}: {change.old}"))
        else:
            console.print(Text(f"  other {change.name}: {change.old} -> {change.new}"))
