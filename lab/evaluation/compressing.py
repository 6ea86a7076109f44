# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.compressing`: a learned compressor's answers beside pooling, pruning and rivals.

The same questions and the same counts of visual tokens. Regions are exact or a little off; or there is none,
and all of the picture is compressed alike, as rivals do it: then all families are asked.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from lab.evaluation.compressing_report import (
    COMPRESSIONS,
    EVENLY,
    SOURCES,
    WHOLE,
    compare,
    markdown,
    name_of,
    print_report,
    shares_of,
    summarize,
    with_localizer,
)
from lab.evaluation.conditions import OFF, Condition
from lab.evaluation.options import shared_settings
from lab.evaluation.published_answers import write_answers
from lab.evaluation.questions import Split, TestScene, make_split
from lab.evaluation.regions import regions_for
from lab.evaluation.rim_regions import shifted
from lab.evaluation.rivals.names import CHOOSERS
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.tuned import TUNING, Tuning, read_tuning
from lab.resampling.lessons import RATES
from vllm_crop.benchmarking.report import write_json
from vllm_crop.benchmarking.session import progress_bar
from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError
from vllm_crop.measuring.provenance import provenance
from vllm_crop.planning.geometry import Region

RIVALS = ("scope", "cdpruner", "divprune", "mmtok")  # the best of the dev split with 43 tokens
OTHERS = (*RIVALS, "stride", "random")
COMPRESSOR = Path("lab/checkpoints/tinyvqa-plc")
MORE_TUNING = TUNING.with_name("tuning_compressing.json")
app = typer.Typer(add_completion=False)


@app.command()
def compressing(
    weights: Annotated[Path, typer.Option(help="Folder of the compressor.")] = COMPRESSOR,
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("lab/checkpoints/tinyvqa"),
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each of the five families.")] = 170,
    split: Annotated[Split, typer.Option(help="Choose on dev, report test.")] = "dev",
    rates: Annotated[str, typer.Option(help="Pruning rates.")] = ",".join(f"{rate:g}" for rate in RATES),
    sources: Annotated[
        str, typer.Option(help=f"Where regions come from, ;-separated: {'; '.join(SOURCES)}.")
    ] = ";".join(SOURCES),
    compressions: Annotated[
        str, typer.Option(help="Which of them; what is left out can be added by another run.")
    ] = ",".join(COMPRESSIONS),
    rivals: Annotated[str, typer.Option(help="Which others; empty for none.")] = ",".join(OTHERS),
    tuning: Annotated[
        list[Path] | None, typer.Option(help="Configurations of rivals, as lab.evaluation.tuning found them.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of conditions and results.")] = Path(
        "build/compressing"
    ),
) -> None:
    """Measure a compressor. Run the command again to go on after an interruption.

    Rivals run at the same count of tokens, and at the count that both passes of CROP have together where the
    model itself has found the region (64 tokens more). All of it takes about an hour on two cores; two runs
    with different --rates may share a folder, and a last one with all of them reports.
    """
    console = Console(highlight=False)
    for option, named, known in (
        ("--sources", sources.split(";"), tuple(SOURCES)),
        ("--compressions", compressions.split(","), COMPRESSIONS),
        ("--rivals", [name for name in rivals.split(",") if name], tuple(CHOOSERS)),
    ):
        if unknown := [name for name in named if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r}: not of {known}", param_hint=option)
    asked = _rates(rates)
    origin = provenance()
    try:
        from lab.evaluation.compressed_answers import CompressedAnswers
        from vllm_crop.compression.files import fingerprint_of, read_files

        settings = {**shared_settings(model, n, split), "rim": CropConfig().rim}
        scenes = make_split(split, n)
        tunings = [read_tuning(path) for path in tuning or (TUNING, MORE_TUNING) if path.exists()]
        fingerprint = fingerprint_of(*read_files(weights))
        names = [name for name in rivals.split(",") if name]
        grid = [
            one
            for one in _grid(asked, sources.split(";"), names, tunings)
            if one.method != "plc" or one.configuration in compressions.split(",")
        ]
        study = _Study(
            scenes,
            CompressedAnswers(model, weights),
            {"resampler": Store(out, {**settings, "compressor": fingerprint})},
            Store(out, settings),
        )
        results = study.run(grid, console)
    except CropError as error:
        console.print(f"The study failed: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on with the first unfinished condition.")
        raise typer.Exit(130) from None
    rows, gains = summarize(scenes, results), compare(scenes, results)
    print_report(console, rows, gains, len(scenes))
    write_answers(out / "answers.jsonl.gz", scenes, results)
    write_json(
        out / "compressing.json",
        {
            "provenance": {**origin, "settings": settings, "compressor": fingerprint},
            "rows": [
                {"condition": name_of(row.condition), "rate": row.condition.pruning_rate, **shares_of(row)}
                for row in rows
            ],
            "gains": [
                {
                    "ours": gain.ours,
                    "other": gain.other,
                    "group": gain.group,
                    "gained": [gain.gained.value, gain.gained.low, gain.gained.high],
                    "p": gain.chance,
                }
                for gain in gains
            ],
        },
    )
    (out / "compressing.md").write_text(markdown(rows, gains, n, split), encoding="utf-8")
    console.print(f"Wrote {out}/compressing.json, compressing.md and answers.jsonl.gz", markup=False)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise typer.BadParameter(f"fractions in (0, 1) needed, got {text!r}", param_hint="--rates")
    return rates


def _grid(
    rates: Sequence[float], sources: Sequence[str], rivals: Sequence[str], tunings: Sequence[Tuning]
) -> list[Condition]:
    grid = [OFF]
    for rate in rates:
        for source in sources:
            # Around a region means and single tokens of the rest answer alike.
            names = COMPRESSIONS if source == EVENLY else ("pool", "resampler")  # of all, sampled is sampled
            grid += [Condition("plc", source, rate, name) for name in names]
        for rival in rivals:
            # With as many tokens as CROP where a client says the region, and where the model has to find it.
            for one in (rate, with_localizer(rate)) if rival in RIVALS else (rate,):
                grid.append(Condition(rival, None, one, _configuration(rival, one, tunings)))
    return list(dict.fromkeys(grid))


def _configuration(rival: str, rate: float, tunings: Sequence[Tuning]) -> str | None:
    """The one that was best on the dev split, at the nearest rate that was tried there."""
    tried = [
        (abs(one.pruning_rate - rate), one.chosen)
        for tuning in tunings
        for one in tuning.methods
        if one.method == rival and one.chosen is not None
    ]
    return min(tried, key=lambda one: one[0])[1] if tried else None


class _Study:
    """Answers of all conditions; finished ones are kept."""

    def __init__(
        self, scenes: Sequence[TestScene], answers: Any, stores: dict[str, Store], store: Store
    ) -> None:
        self.scenes, self.answers, self.stores, self.store = scenes, answers, stores, store

    def run(self, grid: Sequence[Condition], console: Console) -> list[ConditionResult]:
        """One after the other."""
        results = []
        with progress_bar(console) as progress:
            bar = progress.add_task("conditions", total=len(grid))
            for condition in grid:
                progress.update(bar, description=name_of(condition))
                results.append(self._result(condition, progress))
                progress.advance(bar)
        return results

    def _result(self, condition: Condition, progress: Progress) -> ConditionResult:
        store = self.stores.get(condition.configuration or "", self.store)
        known = store.load(condition, "transformers")
        if known is not None:
            return known
        answers = []
        bar = progress.add_task("scenes", total=len(self.scenes))
        for task in tasks_of(condition, self.scenes):
            (told,) = self.answers.answer(condition, [task])
            answers += told
            progress.advance(bar)
        progress.remove_task(bar)
        result = ConditionResult(condition, "transformers", tuple(answers))
        store.save(result)
        return result


def tasks_of(condition: Condition, scenes: Sequence[TestScene]) -> Iterator[Any]:
    """The questions of every scene with the regions of a condition."""
    from lab.evaluation.asking import SceneTask

    oracle = regions_for("oracle", scenes)
    for scene, exact in zip(scenes, oracle, strict=True):
        regions: list[Region | None] = [None] * len(exact)
        if condition.region == WHOLE:
            regions = [Region.whole()] * len(exact)
        elif condition.region not in (None, EVENLY):
            regions = list(exact)
        if condition.region is not None and condition.region.startswith("shifted"):
            regions = [
                region and shifted(region, scene.scene.side, f"{scene.scene.seed} {question.text}")
                for region, question in zip(regions, scene.questions, strict=True)
            ]
        yield SceneTask(scene, tuple(regions))


if __name__ == "__main__":
    app()
