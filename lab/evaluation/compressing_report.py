# SPDX-License-Identifier: Apache-2.0
"""What the study of compressors has found: shares, paired differences, tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

from rich.console import Console
from rich.table import Table

from lab.evaluation.conditions import OFF, Condition
from lab.evaluation.questions import TestScene
from lab.evaluation.rivals.names import CHOOSERS
from lab.evaluation.stats import Estimate, difference, holm, mcnemar, wilson
from lab.evaluation.store import ConditionResult
from lab.evaluation.summary import families_of, right_answers
from lab.tinyvqa.questions import FAMILIES, LOCAL

COMPRESSIONS = ("pool", "prune", "resampler")
WHOLE, EVENLY = "whole", "evenly"
SOURCES = {
    "exact": "the smallest region that holds the answer, without a rim",
    "exact, rim": "with the rim that servers have if nobody says otherwise",
    "shifted": "every box moved by one of 8x8 cells, without a rim",
    "shifted, rim": "with the rim",
    WHOLE: "the box [0, 0, 1, 1]: all of the picture, of which tokens are sampled",
    EVENLY: "no region: all of the picture in even groups, as a budget has it where images are not resized",
}
LOCALIZER_TOKENS = 64  # of the view in which tinyvqa finds a region, through all layers


@dataclass(frozen=True)
class Row:
    """Right answers of one condition, by group of families."""

    condition: Condition
    right: dict[str, Estimate]


@dataclass(frozen=True)
class Gain:
    """How much more is answered right than by another condition, paired; `chance` of it between equals."""

    ours: str
    other: str
    group: str
    gained: Estimate
    chance: float


def with_localizer(rate: float) -> float:
    """The rate that leaves as many tokens as both passes of CROP have together."""
    return max(0.0, round(rate - LOCALIZER_TOKENS / 576, 3))


def shares_of(row: Row) -> dict[str, list[float]]:
    """As JSON."""
    return {group: [share.value, share.low, share.high] for group, share in row.right.items()}


def name_of(condition: Condition) -> str:
    """As people read it."""
    if condition == OFF:
        return "unpruned"
    if condition.method == "plc":
        return f"{condition.configuration}, {condition.region}"
    return CHOOSERS[condition.method]


def groups_of(condition: Condition, families: Sequence[str]) -> dict[str, list[bool]]:
    """Which questions count; a region is known of local ones alone."""
    groups: dict[str, tuple[str, ...]] = {"local": LOCAL}
    if condition.region in (None, WHOLE, EVENLY):
        groups["all"] = FAMILIES
        groups.update((name, (name,)) for name in FAMILIES)
    return {name: [family in of for family in families] for name, of in groups.items()}


def summarize(scenes: Sequence[TestScene], results: Sequence[ConditionResult]) -> list[Row]:
    """A row per condition."""
    families = families_of(scenes)
    rows = []
    for result in results:
        right = right_answers(scenes, result)
        shares = {
            name: wilson(sum(compress(right, chosen)), sum(chosen))
            for name, chosen in groups_of(result.condition, families).items()
        }
        rows.append(Row(result.condition, shares))
    return rows


def compare(scenes: Sequence[TestScene], results: Sequence[ConditionResult]) -> list[Gain]:
    """The resampler against pooling, pruning and rivals; chances are corrected for all comparisons."""
    families = families_of(scenes)
    right = {one.condition: right_answers(scenes, one) for one in results}
    gains: list[Gain] = []
    for ours in right:
        if ours.configuration != "resampler" or ours.pruning_rate is None:
            continue
        others = [replace(ours, configuration=name) for name in COMPRESSIONS if name != "resampler"]
        found = ours.region not in (WHOLE, EVENLY)
        rates = {ours.pruning_rate, with_localizer(ours.pruning_rate)} if found else {ours.pruning_rate}
        others += [one for one in right if one.method in CHOOSERS and one.pruning_rate in rates]
        groups = groups_of(ours, families)
        for other in others:
            if other not in right:
                continue
            for group in ("local", "all") if not found else ("local",):
                pair = [list(compress(right[one], groups[group])) for one in (ours, other)]
                gains.append(Gain(_at(ours), _at(other), group, difference(*pair), mcnemar(*pair)))
    corrected = holm([gain.chance for gain in gains])
    return [replace(gain, chance=chance) for gain, chance in zip(gains, corrected, strict=True)]


def _at(condition: Condition) -> str:
    return f"{name_of(condition)} at {condition.pruning_rate:g}"


def print_report(console: Console, rows: Sequence[Row], gains: Sequence[Gain], num_scenes: int) -> None:
    rates = sorted({row.condition.pruning_rate for row in rows if row.condition.pruning_rate is not None})
    table = Table(title=f"right answers in %, local / all families, {num_scenes} scenes")
    table.add_column("")
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    by_name: dict[str, dict[float | None, Row]] = {}
    for row in rows:
        by_name.setdefault(name_of(row.condition), {})[row.condition.pruning_rate] = row
    for name, found in by_name.items():
        if None in found:
            table.caption = f"unpruned {_text(found[None])}"
        else:
            table.add_row(name, *(_text(found[rate]) if rate in found else "" for rate in rates))
    console.print(table)
    console.print(
        f"Differences with 95 % intervals; p is McNemar's, corrected by Holm for all {len(gains)} "
        "comparisons of this run, those with rivals among them.",
    )
    for gain in gains:
        if gain.other.startswith(("pool", "prune")):
            value, low, high = (100 * one for one in (gain.gained.value, gain.gained.low, gain.gained.high))
            console.print(
                f"{gain.ours} against {gain.other}, {gain.group}: {value:+.1f} ({low:.1f} to {high:.1f}), "
                f"p {gain.chance:.3f}",
                markup=False,
            )


def markdown(rows: Sequence[Row], gains: Sequence[Gain], n: int, split: str) -> str:
    """The tables, for people."""
    rates = sorted({row.condition.pruning_rate for row in rows if row.condition.pruning_rate is not None})
    by_name: dict[str, dict[float | None, Row]] = {}
    for row in rows:
        by_name.setdefault(name_of(row.condition), {})[row.condition.pruning_rate] = row
    unpruned = by_name.pop("unpruned")[None]
    lines = [
        "# Compressors: right answers in percent",
        "",
        f"Made by `python -m lab.evaluation.compressing`: {n} questions of each of five families, {split} "
        "split. Local families (read, relation, compare) / all five, where the whole picture is compressed. "
        f"Unpruned: {_text(unpruned)}.",
        "",
        "| | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(_text(found[rate]) if rate in found else "" for rate in rates) + " |"
        for name, found in by_name.items()
    ]
    lines += ["", *(f"* {name}: {meaning}." for name, meaning in SOURCES.items()), "", "## By family", ""]
    lines += ["| | rate | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 2) + "|"]
    for name, found in by_name.items():
        for rate, row in found.items():
            if "all" in row.right:
                shares = " | ".join(f"{100 * row.right[family].value:.1f}" for family in FAMILIES)
                lines.append(f"| {name} | {rate:g} | {shares} |")
    lines += [
        "",
        "## Differences",
        "",
        f"Paired, with 95 % intervals; p by McNemar, corrected by Holm for {len(gains)} comparisons. "
        "Questions about one scene count as independent.",
        "",
        "| | against | | points | p |",
        "|---|---|---|---|---|",
    ]
    for gain in gains:
        value, low, high = (100 * one for one in (gain.gained.value, gain.gained.low, gain.gained.high))
        cells = [gain.ours, gain.other, gain.group, f"{value:+.1f} ({low:.1f} to {high:.1f})"]
        lines.append(f"| {' | '.join(cells)} | {gain.chance:.3f} |")
    return "\n".join(lines) + "\n"


def _text(row: Row) -> str:
    return " / ".join(f"{100 * row.right[name].value:.1f}" for name in ("local", "all") if name in row.right)
