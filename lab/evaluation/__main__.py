# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.evaluation`: accuracy at a budget, CROP against rivals and controls."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lab.evaluation.conditions import METHODS, RATES, SERVER, make_grid, no_configuration
from lab.evaluation.options import Engine, Options
from lab.evaluation.questions import Split
from lab.evaluation.regions import ALL_SOURCES, DESCRIPTIONS, SOURCES
from lab.evaluation.tuned import TUNING, read_tuning
from vllm_crop.commands.region_options import parse_layers
from vllm_crop.errors import CropError

QUICK_PER_FAMILY = 20
QUICK_RATES = [0.889]
DEFAULT_RATES = ",".join(f"{rate:g}" for rate in RATES)

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Option(help="Folder of the checkpoint, which must know the scenes of tinyvqa.")
    ] = Path("lab/checkpoints/tinyvqa"),
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each of the five families.")] = 500,
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help=f"What to measure, of {', '.join(METHODS)}.")
    ] = ",".join(METHODS),
    rates: Annotated[
        str, typer.Option(metavar="R1,R2,...", help="Fractions of visual tokens to remove.")
    ] = DEFAULT_RATES,
    regions: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Where CROP's regions come from: "
            + "; ".join(f"{source}: {meaning}" for source, meaning in DESCRIPTIONS.items())
            + ". Controls are run with the first of CROP's methods only.",
        ),
    ] = ",".join(SOURCES),
    engine: Annotated[
        Engine,
        typer.Option(
            help="What answers everything but the rivals: the engine that serves, or plain transformers "
            "running the same plans."
        ),
    ] = "vllm",
    base_url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible server of this checkpoint instead, such as http://host:8000/v1; its "
            "key from OPENAI_API_KEY."
        ),
    ] = None,
    eviction_layers: Annotated[
        str, typer.Option(metavar="K1,K2,...", help="Decoder layers at which ilp evicts.")
    ] = "1",
    split: Annotated[
        Split | None,
        typer.Option(
            help="Which questions, each about scenes of its own. test: nothing was ever chosen on them; dev: "
            "rivals are tuned on them; seen: those of earlier results, looked at during development. If not "
            "said it is test, and dev with --quick: who tries things out is not to look at the test split."
        ),
    ] = None,
    tuning: Annotated[
        Path,
        typer.Option(
            help="Which configuration of a rival runs at which rate, as `python -m lab.evaluation.tuning` "
            "found it. Without the file it is the first that can meet the rate, mostly the published one."
        ),
    ] = TUNING,
    times: Annotated[
        bool,
        typer.Option(
            help="Measure times to first token once all is answered, every served condition in turn. They "
            "want a quiet machine; answers do not."
        ),
    ] = True,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"{QUICK_PER_FAMILY} questions of a family, at 0.889 only."),
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for conditions, results and page.")] = Path(
        "build/eval"
    ),
) -> None:
    """Measure whether answers survive pruning: CROP, rivals and controls.

    Asks held-out questions about generated scenes. Three families can be answered from a region (read,
    relation, compare), two need the whole image (search, count). Every method gets the same questions, the
    same checkpoint and the same visual tokens to answer from, averaged over decoder layers; what the model
    spends on finding a region is counted beside them. The unpruned model is always measured, to compare with.

    Rivals run in the configuration that was best on other questions: see `python -m lab.evaluation.tuning`.

    Writes results.json, answers.jsonl.gz, curves.png and index.html. Every finished condition is kept: run
    the command again to go on after an interruption, or with more methods or rates to add conditions.

    \b
    A first look, in a few minutes:
      python -m lab.evaluation --quick
    Without vLLM; run with both engines into one folder, the page tells how often they agree:
      python -m lab.evaluation --engine transformers
    Against a server of your own, started with: vllm serve DIR --plugin crop \\
        --crop-config '{"eviction_layers": [1], "position_ids": "original"}'
      python -m lab.evaluation --model DIR --base-url http://localhost:8000/v1 --methods plc,plc+ilp,resize
    A server that finds regions itself, against regions the client asks it for:
      make serve
      python -m lab.evaluation --base-url http://localhost:8000/v1 --methods plc --regions localizer,server
    """
    _check_packages(served=engine == "vllm" and base_url is None, endpoint=base_url is not None)
    sources = _choose(regions, ALL_SOURCES, "--regions")
    if SERVER in sources and base_url is None:
        raise typer.BadParameter(f"{SERVER} needs --base-url", param_hint="--regions")
    tuned = read_tuning(tuning) if tuning.exists() else None
    grid = make_grid(
        _choose(methods, METHODS, "--methods"),
        QUICK_RATES if quick else _parse_rates(rates),
        sources,
        tuned.configuration if tuned else no_configuration,
    )
    options = Options(
        model,
        QUICK_PER_FAMILY if quick else n,
        tuple(grid),
        engine,
        base_url,
        tuple(parse_layers(eviction_layers)),
        split or ("dev" if quick else "test"),
        out,
        tuned,
        times,
    )
    _run(options, Console(highlight=False))


def _run(options: Options, console: Console) -> None:
    from lab.evaluation.report import print_report, write_report
    from lab.evaluation.run import evaluate as run

    try:
        report = run(options, console)
    except CropError as error:
        console.print(f"The evaluation failed: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on with the first unfinished condition.")
        raise typer.Exit(130) from None
    print_report(console, report)
    write_report(options.folder, report)
    console.print(f"Wrote {options.folder}/index.html, results.json and more", markup=False)


def _choose(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in chosen if part not in allowed]
    if wrong or not chosen:
        raise typer.BadParameter(
            f"{', '.join(wrong) or 'nothing'}: not of {', '.join(allowed)}", param_hint=option
        )
    return chosen


def _parse_rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 <= rate < 1 for rate in rates):
        raise typer.BadParameter(
            f"fractions in [0, 1) such as 0.667,0.889 needed, got {text!r}", param_hint="--rates"
        )
    return rates


def _check_packages(served: bool, endpoint: bool) -> None:
    needed = {"torch": True, "transformers": True, "matplotlib": True, "openai": endpoint, "vllm": served}
    missing = [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
    if missing:
        typer.echo(
            f"the evaluation needs {', '.join(missing)}: `make setup` installs all of it"
            + (", or do without vLLM: --engine transformers" if "vllm" in missing else ""),
            err=True,
        )
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
