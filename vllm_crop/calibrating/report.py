# SPDX-License-Identifier: Apache-2.0
"""What a calibration prints, and the file it writes."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_crop.calibrating.outcome import CENTRE, CHOSEN, RANDOM, Outcome, Places
from vllm_crop.calibrating.scoring import WINDOW, kept, most_covered
from vllm_crop.comparing.statistics import share, spread
from vllm_crop.families.model_shape import ModelShape
from vllm_crop.localizers.calibration import Calibration

_FEW = 50
_BAR = 20  # characters of the largest change
_THRESHOLDS = 0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6


def make_calibration(
    outcome: Outcome,
    settings: Mapping[str, Any],
    model_name: str,
    model: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Calibration:
    """What is written.

    Args:
        settings: of the localizer, that it was learned with.
        model: the loaded configuration of the checkpoint.
    """
    learned: dict[str, Any] = {**settings, "layers": list(outcome.rule.layers or ())}
    if outcome.rule.weights is not None:
        learned["weights"] = list(outcome.rule.weights)
    if outcome.threshold is not None:
        learned["whole_below"] = round(outcome.threshold, 4)
    return Calibration(
        settings=learned,
        model_name=model_name,
        model=ModelShape.of(model),
        provenance={
            **provenance,
            "pictures": dict(zip(("decided", "judged"), outcome.pictures, strict=True)),
            "questions": dict(zip(("decided", "judged"), outcome.questions, strict=True)),
        },
        scores=scores(outcome),
    )


def scores(outcome: Outcome) -> dict[str, Any]:
    """Every number that is printed, as plain values."""
    layers = outcome.plan.layers
    return {
        "chosen": outcome.chosen,
        "question_change": {
            str(layer): round(float(much), 4) for layer, much in zip(layers, outcome.change, strict=True)
        },
        "by_layer": {str(layer): _numbers(places) for layer, places in outcome.by_layer.items()},
        "rows": {name: _numbers(places) for name, places in outcome.rows.items()},
        "seconds": None if (told := spread(outcome.seconds)) is None else asdict(told),
        "wanted_coverage": outcome.plan.wanted,
        "confidence_tells_hits": outcome.test.tells_hits(),
        "confidence_tells_places": outcome.test.tells_places(),
        "confidence_tells_places_by_layer": {
            str(layer): told.tells_places() for layer, told in outcome.sure_by_layer.items()
        },
        "thresholds": [
            {"threshold": one, **asdict(kept(one, outcome.test.told, outcome.test.covered))}
            for one in _thresholds(outcome)
        ],
    }


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(f"{json.dumps(calibration.model_dump(), indent=1)}\n", encoding="utf-8")
    os.replace(partial, path)


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The three tables."""
    console.print(_layer_table(outcome))
    if outcome.rows[CHOSEN].hits:
        console.print(_row_table(outcome))
    if outcome.test.told:
        console.print(_threshold_table(outcome))
    for line in notes(outcome):
        console.print(line, markup=False)


def notes(outcome: Outcome) -> Iterator[str]:
    """What a reader must know to read the numbers."""
    (decided, judged), (dev, test) = outcome.pictures, outcome.questions
    yield (
        f"Layers and threshold were chosen by {dev} questions about {decided} pictures, everything else was "
        f"counted on {test} about {judged} others."
    )
    if outcome.rows[CHOSEN].hits:
        yield (
            f"Hit: a window of {WINDOW:g} x {WINDOW:g} around the hottest place shows at least half of a box "
            "that is needed; with 95 % intervals (Wilson). Covers: the mean share of what is needed that the "
            "region shows. Both are of questions about a part of the picture."
        )
    else:
        yield (
            "Without boxes nobody knows whether these places are right: no hits, no threshold. Write boxes "
            "into the file, or leave --data out for generated scenes."
        )
    if outcome.test.told:
        yield (
            "Sure of places: the probability (AUROC) that the confidence is higher for a question about a "
            "part of the picture than for one about all of it; of what is served "
            f"{_two(outcome.test.tells_places())}. That a hit's is higher than a miss's: "
            f"{_two(outcome.test.tells_hits())}. In the last table both kinds of questions count; of those "
            "about all of the picture a region covers its area."
        )
    if (told := spread([1000 * one for one in outcome.seconds])) is not None:
        yield (
            f"One localization at a time, of a picture never seen: {told.text(0, ' ms')}; all layers are "
            "watched in this engine, a server watches those of its rule only."
        )
    if outcome.threshold is not None and len(outcome.dev.told) < _FEW:
        yield f"A threshold from {len(outcome.dev.told)} questions is rough: {_FEW} or more are better."
    if outcome.dev.told and outcome.threshold is None:
        most = most_covered(outcome.dev.told, outcome.dev.covered)
        yield (
            f"No threshold reaches the wanted coverage of {outcome.plan.wanted:g} with a tenth of the "
            f"questions left: the most is {most:.2f}. whole_below stays at its default; want less "
            "(--coverage), or make windows larger (--localizer-config)."
        )


def _layer_table(outcome: Outcome) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Layers")
    titles = ("layer", "changes with the question", "", "hit", "covers", "sure of places", "chosen")
    for title in titles if outcome.weights is None else (*titles, "weight"):
        table.add_column(title, justify="right" if title == "layer" else "left")
    most = float(outcome.change.max())
    for index, (layer, much) in enumerate(zip(outcome.plan.layers, outcome.change, strict=True)):
        places = outcome.by_layer[layer]
        table.add_row(
            str(layer),
            f"{much:.3f}",
            "█" * round(_BAR * float(much) / most),
            str(share(places.hits)),
            _mean(places.covered),
            _two(outcome.sure_by_layer[layer].tells_places()),
            "yes" if layer in outcome.chosen else "",
            *([] if outcome.weights is None else [f"{outcome.weights[index]:.2f}"]),
        )
    return table


def _row_table(outcome: Outcome) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Who finds the place")
    for title in ("", "hit", "covers", "with area", "ms, one at a time"):
        table.add_column(title)
    for name, places in outcome.rows.items():
        label = f"{name} {outcome.chosen}" if name == CHOSEN else name
        if name == outcome.served and (views := spread(outcome.view_tokens)) is not None:
            label += f", view of at most {views.median:.0f}"
        timed = None if name in (CENTRE, RANDOM) else spread([1000 * one for one in places.seconds])
        hits = (
            f"{100 * sum(places.hits) / len(places.hits):.1f} %"
            if name == RANDOM
            else str(share(places.hits))
        )
        table.add_row(
            label, hits, _mean(places.covered), _mean(places.areas), "-" if timed is None else timed.text(0)
        )
    return table


def _threshold_table(outcome: Outcome) -> Table:
    told = outcome.test
    table = Table(box=SIMPLE_HEAD, title="What the confidence is worth")
    for head in ("served whole below", "pruned", "covers, of these", ""):
        table.add_column(head)
    for one in _thresholds(outcome):
        left = kept(one, told.told, told.covered)
        table.add_row(
            f"{one:.3f}",
            f"{left.count} of {left.n}",
            "-" if left.coverage is None else f"{left.coverage:.3f}",
            f"whole_below, for {outcome.plan.wanted:g}" if one == outcome.threshold else "",
        )
    return table


def _thresholds(outcome: Outcome) -> list[float]:
    most = max(outcome.test.told, default=0.0)
    usual = [one for one in _THRESHOLDS if one <= most]
    return sorted({*usual, *([] if outcome.threshold is None else [outcome.threshold])})


def _numbers(places: Places) -> dict[str, Any] | None:
    if not places.hits:
        return None
    hits, covered, timed = share(places.hits), spread(places.covered), spread(places.seconds)
    return {
        "hit": asdict(hits),
        "covered": None if covered is None else covered.mean,
        "area": sum(places.areas) / len(places.areas),
        "seconds": None if timed is None else asdict(timed),
    }


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: list[float]) -> str:
    return "-" if not values else f"{sum(values) / len(values):.3f}"
