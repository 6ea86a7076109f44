# SPDX-License-Identifier: Apache-2.0
"""Accuracy against what it costs: one line per row of the table, with its interval as a band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.evaluation.conditions import CROP_METHODS, OFF, Condition
from lab.evaluation.summary import Row

_TICKS = (43, 64, 96, 128, 192, 288, 576)  # tokens
Cost = Literal["answer", "total", "work", "kv", "ttft"]
_COSTS: dict[Cost, str] = {
    "answer": "visual tokens, averaged over layers, without the localizer's pass",
    "total": "visual tokens, averaged over layers, with those of the localizer's pass",
    "work": "multiply-adds of the language model before it answers, as a share of the unpruned prompt's",
    "kv": "tokens of the prompt that a layer keeps while it decodes, averaged over layers",
    "ttft": "ms to the first token on vLLM, the localizer's request included",
}


@dataclass(frozen=True)
class Panel:
    """One plot: of which group of families, with which rows, against which cost."""

    title: str
    group: str
    shows: Callable[[Condition], bool]
    cost: Cost = "answer"

    def costs(self, row: Row, localizer_ms: float | None) -> float | None:
        """Where a row stands; None where nobody knows."""
        score = row.groups[self.group]
        if self.cost == "ttft":
            found = localizer_ms if row.condition.locates else 0.0
            return None if row.ttft_ms is None or found is None else row.ttft_ms + found
        return {
            "answer": score.visual_tokens,
            "total": score.total_tokens,
            "work": score.prefill_work,
            "kv": score.kv_tokens,
        }[self.cost]


def _against(condition: Condition) -> bool:
    """CROP as it would be served, and what it is compared with: even pooling, "whole", is a rival too."""
    return condition.region in (None, "localizer", "whole")


_LOCAL = "read, relation, compare"
_EVERY = "with search and count"
PANELS = (
    # The four costs, what it costs to find a region in each of them.
    Panel(f"Visual tokens of all passes\n{_LOCAL}", "local", _against, "total"),
    Panel(f"Prefill work of all passes\n{_LOCAL}", "local", _against, "work"),
    Panel(f"KV while decoding\n{_LOCAL}", "local", _against, "kv"),
    Panel(f"Time to first token, of what runs on vLLM\n{_LOCAL}", "local", _against, "ttft"),
    Panel(f"Where the region comes from\n{_LOCAL}", "local", lambda c: c.method in CROP_METHODS),
    Panel(f"Tokens of the answering pass alone\n{_LOCAL}", "local", _against),
    Panel(f"Visual tokens of all passes\n{_EVERY}", "all", _against, "total"),
    Panel(f"Prefill work of all passes\n{_EVERY}", "all", _against, "work"),
)


def draw_curves(rows: Sequence[Row], path: Path, localizer_ms: float | None = None) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, len(PANELS) // 2, figsize=(29, 19), sharey=True)
    for axis, panel in zip(grid.flat, PANELS, strict=True):
        _draw(axis, panel, rows, localizer_ms)
        axis.set_ylabel("exact answers")
        axis.set_ylim(0, 1.02)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def lines_of(
    rows: Sequence[Row], panel: Panel, localizer_ms: float | None = None
) -> dict[str, list[tuple[float, Row]]]:
    """The points of each line, by ascending cost; what has no rate or no known cost makes none."""
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.condition.pruning_rate is None or row.impossible or not panel.shows(row.condition):
            continue
        if (cost := panel.costs(row, localizer_ms)) is not None:
            lines.setdefault(row.condition.row, []).append((cost, row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _draw(axis: Any, panel: Panel, rows: Sequence[Row], localizer_ms: float | None) -> None:
    for index, (name, points) in enumerate(lines_of(rows, panel, localizer_ms).items()):
        costs = [cost for cost, _ in points]
        shares = [row.groups[panel.group].accuracy for _, row in points]
        style = {"color": f"C{index % 10}", "label": name, **_style(points[0][1].condition, index)}
        axis.plot(costs, [share.value for share in shares], markersize=5, **style)
        bounds = [share.low for share in shares], [share.high for share in shares]
        axis.fill_between(costs, *bounds, color=style["color"], alpha=0.1)
    for row in rows:
        if row.condition == OFF:
            axis.axhline(row.groups[panel.group].accuracy.value, color="black", linewidth=1, label="unpruned")
    if panel.cost in ("answer", "total", "kv"):
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
    axis.set_xlabel(_COSTS[panel.cost])
    axis.set_title(panel.title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _style(condition: Condition, index: int) -> dict[str, Any]:
    marker = "os^Dv"[index // 10 % 5] if condition.method in CROP_METHODS else "x+*"[index // 10 % 3]
    if condition.method in CROP_METHODS:
        return {"linestyle": "-", "linewidth": 2.2, "marker": marker}
    return {"linestyle": ":" if condition.is_control else "--", "linewidth": 1.2, "marker": marker}
