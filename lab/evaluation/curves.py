# SPDX-License-Identifier: Apache-2.0
"""Accuracy against average tokens: one line per row of the table, with its interval as a band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.evaluation.conditions import CROP_METHODS, OFF, Condition
from lab.evaluation.summary import Row

_TICKS = (43, 64, 96, 128, 192, 288, 576)  # tokens


@dataclass(frozen=True)
class Panel:
    """One plot: of which group of families, with which rows, against which count of tokens."""

    title: str
    group: str
    shows: Callable[[Condition], bool]
    total: bool = False

    def tokens(self, row: Row) -> float:
        """Where a row stands: with the localizer's visual tokens, if the plot is of the total."""
        score = row.groups[self.group]
        return score.total_tokens if self.total else score.visual_tokens


def _against(condition: Condition) -> bool:
    """CROP as it would be served, and what it is compared with: even pooling, "whole", is a rival too."""
    return condition.region in (None, "localizer", "whole")


PANELS = (
    Panel(
        "Where the region comes from\nread, relation, compare", "local", lambda c: c.method in CROP_METHODS
    ),
    Panel("CROP's own regions against others\nread, relation, compare", "local", _against),
    Panel("The same, what it costs to find a region included", "local", _against, total=True),
    Panel("CROP's own regions against others\nwith search and count", "all", _against),
)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, len(PANELS) // 2, figsize=(15, 18), sharey=True)
    for axis, panel in zip(grid.flat, PANELS, strict=True):
        _draw(axis, panel, rows)
        axis.set_ylabel("exact answers")
        axis.set_ylim(0, 1.02)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def lines_of(rows: Sequence[Row], panel: Panel) -> dict[str, list[Row]]:
    """The rows of each line, by ascending tokens; what has no rate makes no line."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.condition.pruning_rate is not None and not row.impossible and panel.shows(row.condition):
            lines.setdefault(row.condition.row, []).append(row)
    return {name: sorted(points, key=panel.tokens) for name, points in lines.items()}


def _draw(axis: Any, panel: Panel, rows: Sequence[Row]) -> None:
    for index, (name, points) in enumerate(lines_of(rows, panel).items()):
        scores = [row.groups[panel.group] for row in points]
        tokens = [panel.tokens(row) for row in points]
        shares = [score.accuracy for score in scores]
        style = {"color": f"C{index % 10}", "label": name, **_style(points[0].condition, index)}
        axis.plot(tokens, [share.value for share in shares], markersize=5, **style)
        bounds = [share.low for share in shares], [share.high for share in shares]
        axis.fill_between(tokens, *bounds, color=style["color"], alpha=0.1)
    for row in rows:
        if row.condition == OFF:
            axis.axhline(row.groups[panel.group].accuracy.value, color="black", linewidth=1, label="unpruned")
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
    localizer = "with those of the localizer's pass" if panel.total else "without the localizer's pass"
    axis.set_xlabel(f"visual tokens, averaged over layers, {localizer}")
    axis.set_title(panel.title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _style(condition: Condition, index: int) -> dict[str, Any]:
    marker = "os^Dv"[index // 10 % 5] if condition.method in CROP_METHODS else "x+*"[index // 10 % 3]
    if condition.method in CROP_METHODS:
        return {"linestyle": "-", "linewidth": 2.2, "marker": marker}
    return {"linestyle": ":" if condition.is_control else "--", "linewidth": 1.2, "marker": marker}
