# SPDX-License-Identifier: Apache-2.0
"""Accuracy against average tokens: one line per row of the table, with its interval as a band."""

from collections.abc import Sequence
from pathlib import Path

from vllm_crop.evaluation.cells import CONTROLS, CROP_METHODS, OFF
from vllm_crop.evaluation.summary import Row

_TITLES = {"local": "read, relation, compare", "all": "with search and count"}


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with one panel per group of families."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = group_lines(rows)
    colours = dict(zip(lines, plt.get_cmap("tab20")(range(len(lines))), strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    for axis, group in zip(axes, _TITLES, strict=True):
        for name, points in lines.items():
            tokens = [row.groups[group].visual_tokens for row in points]
            shares = [row.groups[group].accuracy for row in points]
            style = {"color": colours[name], "label": name, **_style(points[0])}
            axis.plot(tokens, [share.value for share in shares], marker="o", markersize=3, **style)
            axis.fill_between(
                tokens, [s.low for s in shares], [s.high for s in shares], color=colours[name], alpha=0.12
            )
        axis.set_xscale("log")
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("visual tokens, averaged over layers")
        axis.set_title(_TITLES[group])
        axis.grid(alpha=0.3)
        for row in rows:
            if row.cell == OFF:
                axis.axhline(row.groups[group].accuracy.value, color="black", linewidth=0.8)
    axes[0].set_ylabel("exact answers (line: unpruned)")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def group_lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each line, by ascending tokens; what has no rate makes no line."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.cell.pruning_rate is not None and not row.impossible:
            lines.setdefault(row.cell.row, []).append(row)
    return {
        name: sorted(points, key=lambda row: row.groups["all"].visual_tokens)
        for name, points in lines.items()
    }


def _style(row: Row) -> dict[str, object]:
    if row.cell.method in CROP_METHODS:
        return {"linestyle": "-", "linewidth": 2.2}
    return {"linestyle": ":" if row.cell.method in CONTROLS else "--", "linewidth": 1.2}
