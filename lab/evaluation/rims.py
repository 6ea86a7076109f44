# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.rims`: what a rim around regions is worth, where they are right and where not.

And what it is worth to prune in late layers alone where the localizer is not sure.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab.evaluation.offline_answers import LOCAL, UNPRUNED, OfflineAnswers, shown
from lab.evaluation.questions import TestScene, make_test_set
from lab.evaluation.regions import area, coverage
from lab.evaluation.rim_regions import SOURCES, Asked, Regions
from lab.tinyvqa.questions import Question
from vllm_crop.crop_params import CropParams
from vllm_crop.measuring.shares import Estimate, wilson
from vllm_crop.request import CropRequest, Found

RIMS = (0.0, 0.0625, 0.125, 0.1875, 0.25)
LATE_LAYER = 7  # of twelve
SCENES_AT_ONCE = 8  # their features stay in the cache for all conditions
Key = tuple[str, float, float]  # source, pruning rate, rim
app = typer.Typer(add_completion=False)


@app.command()
def rims(
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each of the five families.")] = 170,
    seed: Annotated[int, typer.Option(help="Of the scenes; choose on one, report another.")] = 0,
    rates: Annotated[str, typer.Option(help="Pruning rates.")] = "0.778,0.889",
    out: Annotated[Path, typer.Option(help="Where the numbers and the picture go.")] = Path("build/rims"),
) -> None:
    """Ask tinyvqa with regions from several sources, with rims of several widths."""
    console = Console(highlight=False)
    scenes = make_test_set(n, seed)
    engine = OfflineAnswers(eviction_layer=LATE_LAYER)
    study = _Study(engine, [float(rate) for rate in rates.split(",")])
    chunks = [scenes[start : start + SCENES_AT_ONCE] for start in range(0, len(scenes), SCENES_AT_ONCE)]
    for chunk in track(chunks, "scenes", console=console):
        study.ask([(scene, question) for scene in chunk for question in scene.questions])
    study.print(console, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rims.json").write_text(json.dumps({"seed": seed, **study.to_json()}, indent=1) + "\n")
    _draw(study.shares(), out / "rims.png")
    console.print(f"Numbers and picture: {out}", markup=False)


class _Study:
    """Answers by source, rate and rim, and what was found."""

    def __init__(self, engine: OfflineAnswers, rates: Sequence[float]) -> None:
        self.engine, self.rates = engine, rates
        self.regions = Regions(engine.llm, engine.localizer)
        self.right: dict[Key, list[bool]] = {}
        self.unpruned: dict[str, list[bool]] = {"local": [], "unsure": []}
        self.late: list[bool] = []
        self.found: dict[str, list[tuple[Question, TestScene, Found]]] = {source: [] for source in SOURCES}

    def ask(self, asked: Sequence[Asked]) -> None:
        """Ask about some scenes in every way."""
        found = self.regions.of(asked)
        unsure = [one for one, what in zip(asked, found["attention"], strict=True) if what.late]
        if unsure:
            late = CropRequest(CropParams(), found=(Found(late=True),), limited=False)
            self.late += self.engine(unsure, [late] * len(unsure))
            self.unpruned["unsure"] += self.engine(unsure, [UNPRUNED] * len(unsure))
        places = [index for index, (_, question) in enumerate(asked) if question.family in LOCAL]
        local = [asked[index] for index in places]
        self.unpruned["local"] += self.engine(local, [UNPRUNED] * len(local))
        for source in SOURCES:
            regions = [found[source][index] for index in places]
            self.found[source] += [
                (question, scene, one) for (scene, question), one in zip(local, regions, strict=True)
            ]
            for rate in self.rates:
                for rim in RIMS:
                    params = CropParams(pruning_rate=rate, rim=rim, method="plc")
                    crops = [
                        CropRequest(params, found=(without_late(one),), limited=False) for one in regions
                    ]
                    self.right.setdefault((source, rate, rim), []).extend(self.engine(local, crops))

    def shares(self) -> dict[Key, Estimate]:
        """Of right answers, with intervals."""
        return {key: wilson(sum(answers), len(answers)) for key, answers in self.right.items()}

    def places(self, source: str) -> tuple[float, float, float]:
        """Mean coverage and area of what a source found, and the share it served whole."""
        rows = self.found[source]
        covered = fmean(coverage(one.region, question, scene.scene.side) for question, scene, one in rows)
        taken = fmean(area(one.region, scene.scene.side) for _, scene, one in rows)
        return covered, taken, fmean(one.region is None for _, _, one in rows)

    def to_json(self) -> Mapping[str, Any]:
        """Every number of the tables."""
        shares = self.shares()
        return {
            "n": len(self.unpruned["local"]),
            "unpruned": fmean(self.unpruned["local"]),
            "rows": [
                {"source": source, "rate": rate, "rim": rim, "right": shares[source, rate, rim].value}
                for source, rate, rim in shares
            ],
            "found": {
                source: dict(zip(("coverage", "area", "whole"), self.places(source), strict=True))
                for source in SOURCES
            },
            "unsure": {
                "n": len(self.late),
                "late": sum(self.late),
                "whole": sum(self.unpruned["unsure"]),
            },
        }

    def print(self, console: Console, seed: int) -> None:
        """The tables."""
        shares, n = self.shares(), len(self.unpruned["local"])
        whole = wilson(sum(self.unpruned["local"]), n)
        table = Table(
            title=f"right answers in % (95 %), {', '.join(LOCAL)}: n = {n}, seed {seed}; "
            f"unpruned {shown(whole)}"
        )
        for name in ("region", "covers", "area", "whole", "rate"):
            table.add_column(name)
        for rim in RIMS:
            table.add_column(f"rim {rim:g}", justify="right")
        for source in SOURCES:
            facts = [f"{100 * one:.1f}" for one in self.places(source)]
            for rate in self.rates:
                table.add_row(
                    source, *facts, f"{rate:g}", *(shown(shares[source, rate, rim]) for rim in RIMS)
                )
        console.print(table)
        for source, meaning in SOURCES.items():
            console.print(f"- {source}: {meaning}.", markup=False)
        if self.late:
            late, unpruned = wilson(sum(self.late), len(self.late)), self.unpruned["unsure"]
            console.print(
                f"The localizer was not sure of {len(self.late)} questions of all families. Whole: "
                f"{shown(wilson(sum(unpruned), len(unpruned)))} right; a tenth of the tokens from layer "
                f"{LATE_LAYER} on: {shown(late)}.",
                markup=False,
            )


def without_late(found: Found) -> Found:
    """Without what is done in late layers: the rim study leaves such images whole."""
    return Found(found.region, found.warm)


def _draw(shares: Mapping[Key, Estimate], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rates = sorted({rate for _, rate, _ in shares})
    figure, axes = plt.subplots(1, len(rates), figsize=(6 * len(rates), 5), sharey=True, squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        for source in SOURCES:
            points = [shares[source, rate, rim] for rim in RIMS]
            (line,) = axis.plot(RIMS, [point.value for point in points], marker="o", label=source)
            bounds = [point.low for point in points], [point.high for point in points]
            axis.fill_between(RIMS, *bounds, color=line.get_color(), alpha=0.12)
        axis.set_title(f"pruning rate {rate:g}")
        axis.set_xlabel("rim, fraction of the image's sides")
    axes[0][0].set_ylabel("right answers")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    app()
