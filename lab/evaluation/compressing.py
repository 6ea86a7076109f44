# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.compressing`: a learned compressor's answers beside pooling, pruning and rivals.

The same questions and the same counts of visual tokens. Regions are exact or a little off; or there is none,
and all of the picture is compressed alike, as rivals do it: then all families are asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lab.evaluation.conditions import OFF, Condition
from lab.evaluation.options import weights_hash
from lab.evaluation.published_answers import write_answers
from lab.evaluation.questions import SPLITS, Split, TestScene, make_split
from lab.evaluation.regions import regions_for
from lab.evaluation.rim_regions import shifted
from lab.evaluation.rivals.names import CHOOSERS
from lab.evaluation.stats import Estimate, difference, holm, mcnemar, wilson
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.summary import families_of, right_answers
from lab.evaluation.tuned import TUNING, Tuning, read_tuning
from lab.tinyvqa.questions import FAMILIES, LOCAL
from vllm_crop.benchmarking.report import write_json
from vllm_crop.benchmarking.session import progress_bar
from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError
from vllm_crop.measuring.provenance import provenance
from vllm_crop.planning.geometry import Region

RATES = (0.889, 0.926, 0.95, 0.97)
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
RIVALS = ("scope", "cdpruner", "divprune", "mmtok")  # the best of the dev split with 43 tokens
OTHERS = (*RIVALS, "stride", "random")
COMPRESSOR = Path("lab/checkpoints/tinyvqa-plc")
LOCALIZER_TOKENS = 64  # of the view in which tinyvqa finds a region, through all layers
MORE_TUNING = TUNING.with_name("tuning_compressing.json")
app = typer.Typer(add_completion=False)


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
    model itself has found the region (64 tokens more).
    """
    console = Console(highlight=False)
    for option, named, known in (
        ("--sources", sources.split(";"), tuple(SOURCES)),
        ("--compressions", compressions.split(","), COMPRESSIONS),
        ("--rivals", [name for name in rivals.split(",") if name], tuple(CHOOSERS)),
    ):
        if unknown := [name for name in named if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r}: not of {known}", param_hint=option)
    origin = provenance()
    try:
        from lab.evaluation.compressed_answers import CompressedAnswers
        from vllm_crop.compression.settings import fingerprint_of, read_files

        settings = {
            "weights": weights_hash(model),
            "per_family": n,
            "split": split,
            "seed": SPLITS[split],
            "rim": CropConfig().rim,
        }
        scenes = make_split(split, n)
        tunings = [read_tuning(path) for path in tuning or (TUNING, MORE_TUNING) if path.exists()]
        fingerprint = fingerprint_of(*read_files(weights))
        names = [name for name in rivals.split(",") if name]
        grid = [
            one
            for one in _grid([float(rate) for rate in rates.split(",")], sources.split(";"), names, tunings)
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
    _print(console, rows, gains, len(scenes))
    write_answers(out / "answers.jsonl.gz", scenes, results)
    write_json(
        out / "compressing.json",
        {
            "provenance": {**origin, "settings": settings, "compressor": fingerprint},
            "rows": [
                {"condition": name_of(row.condition), "rate": row.condition.pruning_rate, **_shares(row)}
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
    console.print(f"Wrote {out}/compressing.json and answers.jsonl.gz", markup=False)


def _shares(row: Row) -> dict[str, list[float]]:
    return {group: [share.value, share.low, share.high] for group, share in row.right.items()}


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
            for one in (rate, _with_localizer(rate)) if rival in RIVALS else (rate,):
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


def _with_localizer(rate: float) -> float:
    return max(0.0, round(rate - LOCALIZER_TOKENS / 576, 3))


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
        rates = {ours.pruning_rate, _with_localizer(ours.pruning_rate)} if found else {ours.pruning_rate}
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


def _print(console: Console, rows: Sequence[Row], gains: Sequence[Gain], num_scenes: int) -> None:
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
            table.add_row(f"{name}: {_text(found[None])}", *[""] * len(rates))
        else:
            table.add_row(name, *(_text(found[rate]) if rate in found else "" for rate in rates))
    console.print(table)
    for gain in gains:
        if gain.other.startswith(("pool", "prune")):
            value, low, high = (100 * one for one in (gain.gained.value, gain.gained.low, gain.gained.high))
            console.print(
                f"{gain.ours} against {gain.other}, {gain.group}: {value:+.1f} ({low:.1f} to {high:.1f}), "
                f"p {gain.chance:.3f}",
                markup=False,
            )


def _text(row: Row) -> str:
    return " / ".join(f"{100 * row.right[name].value:.1f}" for name in ("local", "all") if name in row.right)


if __name__ == "__main__":
    app()
