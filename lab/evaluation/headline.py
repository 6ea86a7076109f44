# SPDX-License-Identifier: Apache-2.0
"""README's two tables, made of a report: at equal cost, and at equally many tokens of the answering pass."""

from collections.abc import Iterable, Sequence

from lab.evaluation.conditions import CROP_METHODS, OFF, Condition
from lab.evaluation.report import Report, interval, table_cells
from lab.evaluation.summary import Row

RATE = 0.889
STRONGER = 0.926
_UNFAIR = ("resize", "two-images", "no-image")  # untrained, or no way to answer: not among the rivals


def equal_cost(report: Report) -> str:
    """CROP plc with its own regions, and all others with no more tokens than both of its passes have."""
    rows = {row.condition: row for row in report.rows if not row.impossible}
    named = {(row.condition.row, row.condition.pruning_rate): row for row in rows.values()}
    lines = [(row, ["", ""]) for row in rows.values() if _is_ours(row.condition)]
    for one in report.equal_cost:
        other = named[one.against, one.against_rate]
        if (one.method, one.rate) == ("CROP plc, localizer", RATE) and other.condition.method not in _UNFAIR:
            chance = "< 0.001" if one.chance < 0.001 else f"{one.chance:.3f}"
            lines.append((other, [interval(one.gained), chance]))
    head = ("", "visual tokens", "prefill work", "local", "CROP plc's margin", "p")
    return _table(
        head,
        [
            [_name(row), _tokens(row), _work(row), interval(row.groups["local"].accuracy), *margin]
            for row, margin in [(rows[OFF], ["", ""]), *sorted(lines, key=_worst_last)]
        ],
    )


def same_tokens(report: Report) -> str:
    """All at one rate: what a client gets that knows the region, beside what needs none."""
    shown = [
        row
        for row in report.rows
        if not row.impossible
        and (row.condition.pruning_rate == RATE or row.condition.method == "no-image")
        and (row.condition.method not in CROP_METHODS or _says_something(row.condition))
        and (row.condition.method != "two-images" or row.condition.region == "oracle")
    ]
    head = ("at 0.889", "visual tokens, local / all", "local", "all")
    return _table(
        head,
        [
            [_name(row, False), tokens, local, every]
            for row in sorted(shown, key=lambda row: -row.groups["local"].accuracy.value)
            for _, _, tokens, local, _, every, *_ in [table_cells(row)]
        ],
    )


def _is_ours(condition: Condition) -> bool:
    """CROP at the rate of the table; plc at the next one, too."""
    rates = (RATE, STRONGER) if condition.method == "plc" else (RATE,)
    return (
        condition.method in CROP_METHODS
        and condition.region == "localizer"
        and condition.pruning_rate in rates
    )


def _says_something(condition: Condition) -> bool:
    """The model's own regions, and those of plc that are not meant to help."""
    return condition.region == "localizer" or (condition.method == "plc" and condition.region != "oracle")


def _worst_last(line: tuple[Row, list[str]]) -> float:
    return -line[0].groups["local"].accuracy.value


def _name(row: Row, with_rate: bool = True) -> str:
    condition = row.condition
    rate = f" at {condition.pruning_rate:g}" if with_rate and condition.pruning_rate is not None else ""
    if condition.method in CROP_METHODS and condition.region == "localizer":
        return f"**CROP {condition.method}{rate}**"
    if condition.region == "whole":
        return f"no region, the image pooled evenly{rate}"
    return f"{row.condition.row}{rate}"


def _tokens(row: Row) -> str:
    score = row.groups["local"]
    found = f" + {score.localizer_tokens:.0f}" if score.localizer_tokens else ""
    return f"{score.visual_tokens:.0f}{found}"


def _work(row: Row) -> str:
    share = row.groups["local"].prefill_work
    return "" if share is None else f"{share:.2f}x"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
