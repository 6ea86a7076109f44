# SPDX-License-Identifier: Apache-2.0
"""Accuracy against average tokens: one line per row of the table, with its interval as a band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.evaluation.conditions import CONTROLS, CROP_METHODS, OFF, Condition
from lab.evaluation.summary import Row

_TICKS = (43, 64, 96, 128, 192, 288, 576)  # tokens


@dataclass(frozen=True)
class Panel:
    """One plot: of which group of families, with which rows."""

    title: str
    group: str
    shows: Callable[[Condition], bool]


def _against(condition: Condition) -> bool:
    """CROP as it would be served, and what it is compared with: even pooling, "whole", is a rival too."""
    return condition.region in (None, "localizer", "whole")


PANELS = (
    Panel(
        "Where the region comes from\nread, relation, compare", "local", lambda c: c.method in CROP_METHODS
    ),
    Panel("CROP's own regions against others\nread, relation, compare", "local", _against),
    Panel("CROP's own regions against others\nwith search and count", "all", _against),
)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(17, 7), sharey=True)
    for axis, panel in zip(axes, PANELS, strict=True):
        _draw(axis, panel, rows)
    axes[0].set_ylabel("exact answers")
    axes[0].set_ylim(0, 1.02)
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
    return {
        name: sorted(points, key=lambda row: row.groups[panel.group].visual_tokens)
        for name, points in lines.items()
    }


def _draw(axis: Any, panel: Panel, rows: Sequence[Row]) -> None:
    for index, (name, points) in enumerate(lines_of(rows, panel).items()):
        scores = [row.groups[panel.group] for row in points]
        tokens = [score.visual_tokens for score in scores]
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
    axis.set_xlabel("visual tokens, averaged over layers, without the localizer's 64")
    axis.set_title(panel.title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _style(condition: Condition, index: int) -> dict[str, Any]:
    marker = "os^Dv"[index // 10 % 5] if condition.method in CROP_METHODS else "x+*"[index // 10 % 3]
    if condition.method in CROP_METHODS:
        return {"linestyle": "-", "linewidth": 2.2, "marker": marker}
    return {"linestyle": ":" if condition.method in CONTROLS else "--", "linewidth": 1.2, "marker": marker}
