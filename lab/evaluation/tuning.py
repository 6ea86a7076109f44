# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation.tuning`: which configuration of every rival answers most on the dev split.

Every rival has a short list of configurations, what was published first (`rivals/registry.py`). Each is asked
the local questions of the dev split at each rate. VTW is not tuned by answers: its own rule finds its layer.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lab.evaluation.conditions import OFF, RATES, Condition
from lab.evaluation.options import shared_settings
from lab.evaluation.questions import Split, TestScene, make_split, only_local
from lab.evaluation.rivals.names import CHOOSERS
from lab.evaluation.stats import wilson
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.summary import right_answers
from lab.evaluation.tuned import TUNING, Tried, Tuned, Tuning, choose, read_tuning, write_tuning
from vllm_crop.benchmarking.report import write_json
from vllm_crop.benchmarking.session import progress_bar
from vllm_crop.errors import CropError
from vllm_crop.measuring.provenance import provenance

if TYPE_CHECKING:
    from lab.evaluation.transformers_answers import TransformersAnswers

VTW = "vtw"
app = typer.Typer(add_completion=False)


@app.command()
def tune(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("lab/checkpoints/tinyvqa"),
    n: Annotated[
        int, typer.Option("--n", min=1, help="Questions of each of the three local families.")
    ] = 100,
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help=f"What to tune, of {', '.join(CHOOSERS)}.")
    ] = ",".join(CHOOSERS),
    rates: Annotated[
        str, typer.Option(metavar="R1,R2,...", help="Fractions of visual tokens to remove.")
    ] = ",".join(f"{rate:g}" for rate in RATES),
    split: Annotated[
        Split, typer.Option(help="Whose questions are asked. The test split is for results: it is refused.")
    ] = "dev",
    folder: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = Path("build/tuning"),
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")] = TUNING,
) -> None:
    """Try every configuration of every rival, and write down which answers most.

    What the file knows of other methods and rates stays in it, if it was found by the same questions. Run
    the command again to go on after an interruption.
    """
    if split == "test":
        raise typer.BadParameter("nothing is chosen on the test split", param_hint="--split")
    names = [name.strip() for name in methods.split(",")]
    if unknown := [name for name in names if name not in CHOOSERS]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: not of {', '.join(CHOOSERS)}", param_hint="--methods"
        )
    console = Console(highlight=False)
    origin = provenance()
    scenes = only_local(make_split(split, n))
    try:
        settings = {**shared_settings(model, n, split), "families": "local"}
        study = _Study(model, scenes, Store(folder, settings), console, origin["git_revision"])
        tuned = study.run(names, [float(rate) for rate in rates.split(",")])
    except CropError as error:
        console.print(f"The tuning failed: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on with the first unfinished cell.")
        raise typer.Exit(130) from None
    asked = sum(len(scene.questions) for scene in scenes)
    origin |= {"model": str(model), "settings": settings, "asked": asked, "seconds": round(study.seconds, 1)}
    known = read_tuning(out) if out.exists() else None
    write_tuning(out, Tuning(origin, tuple(tuned)).beside(known))
    _print(console, tuned)
    console.print(f"Wrote {out}", markup=False)


class _Study:
    """The cells of one tuning; finished ones are kept in the store."""

    def __init__(
        self, model: Path, scenes: tuple[TestScene, ...], store: Store, console: Console, revision: str | None
    ) -> None:
        self.model, self.scenes, self.store = model, scenes, store
        self.console, self.revision = console, revision
        self.seconds = 0.0

    def run(self, methods: Sequence[str], rates: Sequence[float]) -> list[Tuned]:
        """A result for every method and rate."""
        from lab.evaluation.rivals.registry import RIVALS
        from lab.evaluation.session import Session

        answers = _lazily(lambda: self._answers())
        divergences = self._divergences(answers) if VTW in methods else {}
        grid = [
            Condition(method, None, rate, configuration)
            for method in methods
            if method != VTW
            for rate in rates
            for configuration in RIVALS[method].configurations
        ]
        session = Session(
            self.scenes,
            lambda condition: answers(),
            lambda condition: "transformers",
            self.store,
            self.console,
            self.revision,
        )
        results = {one.condition: one for one in session.run([OFF, *grid])}
        self.seconds += sum(one.seconds for one in results.values())
        return [
            self._by_rule(rate, divergences) if method == VTW else self._by_answers(method, rate, results)
            for method in methods
            for rate in rates
        ]

    def _by_answers(self, method: str, rate: float, results: dict[Condition, ConditionResult]) -> Tuned:
        cells = [
            one
            for condition, one in results.items()
            if (condition.method, condition.pruning_rate) == (method, rate)
        ]
        tried = tuple(map(self._tried, cells))
        return Tuned(method, rate, choose(tried), tried)

    def _tried(self, result: ConditionResult) -> Tried:
        name = result.condition.configuration or ""
        if result.impossible:
            return Tried(name, impossible=result.impossible)
        right = right_answers(self.scenes, result)
        return Tried(name, wilson(sum(right), len(right)), len(right))

    def _by_rule(self, rate: float, divergences: dict[int, float]) -> Tuned:
        """VTW's layer is the model's and the same at every rate, which it may not meet."""
        from lab.evaluation.rivals.vtw import named, smallest_below

        layer = smallest_below(divergences)
        asked = sum(len(scene.questions) for scene in self.scenes)
        tried = tuple(
            Tried(named(one), None, asked, divergence=mean) for one, mean in sorted(divergences.items())
        )
        return Tuned(VTW, rate, None if layer is None else named(layer), tried)

    def _divergences(self, answers: "Callable[[], TransformersAnswers]") -> dict[int, float]:
        """Mean divergence of predictions when all visual tokens leave at a layer, for every layer."""
        path = self.store.folder / "vtw.json"
        if path.exists() and (known := json.loads(path.read_text()))["settings"] == self.store.settings:
            return {int(layer): mean for layer, mean in known["divergences"].items()}
        from lab.evaluation.rivals.vtw import divergence, withdrawal

        asker, found = answers(), dict[int, list[float]]()
        with progress_bar(self.console) as progress:
            for scene in progress.track(self.scenes, description="VTW's layers"):
                seen, texts = asker.see(scene.scene), [question.text for question in scene.questions]
                full = asker.runner.answer([seen], texts, steps=1)
                for layer in range(1, asker.runner.num_layers):
                    moved = asker.runner.answer([seen], texts, withdrawal(layer), steps=1)
                    found.setdefault(layer, []).extend(
                        divergence(one.logprobs, other.logprobs)
                        for one, other in zip(full, moved, strict=True)
                    )
        means = {layer: fmean(values) for layer, values in found.items()}
        write_json(path, {"settings": self.store.settings, "divergences": means})
        return means

    def _answers(self) -> "TransformersAnswers":
        from lab.evaluation.transformers_answers import TransformersAnswers

        return TransformersAnswers(self.model, (1,))


def _lazily(make: Callable[[], Any]) -> Callable[[], Any]:
    """The same object every time, made when it is first wanted."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def _print(console: Console, tuned: Sequence[Tuned]) -> None:
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("method", "rate", "first", "chosen", "", "of"):
        shown.add_column(title, justify="right" if title in ("rate", "first", "of") else "left")
    for one in tuned:
        measured = [tried for tried in one.tried if tried.accuracy]
        best = next((tried for tried in measured if tried.configuration == one.chosen), None)
        shown.add_row(
            CHOOSERS[one.method],
            f"{one.pruning_rate:g}",
            _share(measured[0] if measured else None),
            one.chosen or "impossible",
            _share(best),
            str(len(measured)),
        )
    console.print(shown)


def _share(tried: Tried | None) -> str:
    return f"{100 * tried.accuracy.value:.1f}" if tried and tried.accuracy else ""


if __name__ == "__main__":
    app()
