# SPDX-License-Identifier: Apache-2.0
"""The picture of a calibration: what each layer does, who finds the place, what a confidence is worth."""

from pathlib import Path
from typing import Any

from vllm_crop.calibrating.outcome import Outcome
from vllm_crop.calibrating.scoring import kept

_CHOSEN, _OTHER, _HIT, _COVERED = "#d9682a", "#b9c0c9", "#1d4e89", "#3a9b6f"


def draw_outcome(outcome: Outcome, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Any] = [_layers]
    if any(places.hits for places in outcome.rows.values()):
        panels.append(_rows)
    if outcome.test.told:
        panels.append(_confidence)
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, outcome)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _layers(axis: Any, outcome: Outcome) -> None:
    layers = list(outcome.plan.layers)
    colours = [_CHOSEN if layer in outcome.chosen else _OTHER for layer in layers]
    axis.bar(layers, outcome.change, color=colours, label="changes with the question, orange: chosen")
    judged = [outcome.by_layer[layer] for layer in layers]
    if any(places.hits for places in judged):
        axis.plot(layers, [_mean(one.hits) for one in judged], "o-", color=_HIT, label="hit")
        axis.plot(layers, [_mean(one.covered) for one in judged], "s--", color=_COVERED, label="covers")
    axis.set(xlabel="decoder layer", ylim=(0, 1.02), title="Each layer alone")
    _legend(axis)


def _rows(axis: Any, outcome: Outcome) -> None:
    names = list(outcome.rows)[::-1]
    places = [outcome.rows[name] for name in names]
    axis.barh(range(len(names)), [_mean(one.hits) for one in places], 0.4, color=_HIT, label="hit")
    below = [index - 0.4 for index in range(len(names))]
    axis.barh(below, [_mean(one.covered) for one in places], 0.4, color=_COVERED, label="covers")
    axis.set_yticks([index - 0.2 for index in range(len(names))], names, fontsize=8)
    axis.set(xlim=(0, 1.02), title=f"Who finds the place (n {_count(outcome)})")
    _legend(axis)


def _confidence(axis: Any, outcome: Outcome) -> None:
    told = outcome.test
    thresholds = sorted({0.0, *told.told})
    left = [kept(one, told.told, told.covered) for one in thresholds]
    axis.step(thresholds, [one.coverage for one in left], color=_COVERED, label="covers, of those pruned")
    axis.step(thresholds, [one.count / one.n for one in left], color=_HIT, label="share that is pruned")
    if outcome.threshold is not None:
        axis.axvline(outcome.threshold, color=_CHOSEN, label=f"whole_below {outcome.threshold:.3f}")
    axis.axhline(outcome.plan.wanted, color=_OTHER, linewidth=1)
    axis.set(xlabel="served whole below this confidence", ylim=(0, 1.02))
    axis.set_title(
        f"Confidence (n {len(told.told)}, questions about all of the picture included)", fontsize=10
    )
    _legend(axis)


def _legend(axis: Any) -> None:
    """Below the plot, where it hides nothing."""
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)


def _count(outcome: Outcome) -> int:
    return len(next(iter(outcome.rows.values())).hits)


def _mean(values: Any) -> float:
    return sum(values) / len(values) if values else 0.0
