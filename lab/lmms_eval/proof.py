# SPDX-License-Identifier: Apache-2.0
"""`make lmms-eval`: asks the same questions with lmms-eval and with our own evaluation, answer by answer."""

import tempfile
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lab.demo.setting import EVICTION_LAYERS, MODEL, SERVER_ENVIRONMENT
from lab.evaluation.options import Options
from lab.evaluation.published_answers import NAME as ANSWERS
from lab.evaluation.published_answers import PublishedAnswers, read_answers
from lab.evaluation.questions import Split
from lab.evaluation.run import evaluate
from lab.lmms_eval.comparison import differences, table
from lab.lmms_eval.running import Answers, run_lmms_eval
from lab.lmms_eval.task import write_task
from lab.lmms_eval.ways import ENGINE, SERVER_OPTIONS, WAYS, Way
from vllm_crop.errors import CropError
from vllm_crop.measuring.server import Server, serve

SPLIT: Split = "dev"


def main(
    per_family: Annotated[
        int, typer.Option("--n", min=1, help="Questions of each of the five families.")
    ] = 40,
    out: Annotated[Path, typer.Option(help="Where a folder of this run goes.")] = Path("build/lmms_eval"),
) -> None:
    """Ask tinyvqa with lmms-eval and with `python -m lab.evaluation`; fail where answers differ."""
    console = Console(width=None if Console().is_terminal else 120)
    if find_spec("lmms_eval") is None:
        console.print("lmms-eval is not installed here: run make lmms-eval", style="red")
        raise typer.Exit(1)
    folder = out / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    try:
        theirs, ours = ask_all(folder, per_family, console)
    except CropError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(table(theirs, ours))
    console.print(f"lmms-eval's logs and samples are in {folder}", markup=False)
    different = differences(theirs, ours)
    for line in different:
        console.print(line, markup=False)
    raise typer.Exit(1 if different else 0)


def ask_all(folder: Path, per_family: int, console: Console) -> tuple[list[Answers], list[PublishedAnswers]]:
    """Answers of lmms-eval and of our own evaluation, way by way."""
    task = write_task(folder / "task", per_family, SPLIT)
    with serve(
        MODEL.as_posix(), *SERVER_OPTIONS, log_path=folder / "server.log", env=SERVER_ENVIRONMENT
    ) as server:
        ours = ask_ourselves(server, per_family, console)
        theirs = {way.name: ask_lmms_eval(way, task, folder, server, console) for way in WAYS if way.served}
    theirs |= {way.name: ask_lmms_eval(way, task, folder, None, console) for way in WAYS if not way.served}
    return [theirs[way.name] for way in WAYS], [ours[way.condition.slug] for way in WAYS]


def ask_ourselves(server: Server, per_family: int, console: Console) -> dict[str, PublishedAnswers]:
    """Answers of `python -m lab.evaluation` to the same questions, by condition."""
    conditions = tuple(dict.fromkeys(way.condition for way in WAYS))
    base_url = f"{server.base_url}/v1"
    # It keeps finished conditions in its folder: in a new one nothing is finished.
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(
            MODEL,
            per_family,
            conditions,
            "vllm",
            base_url,
            EVICTION_LAYERS,
            SPLIT,
            Path(scratch),
            times=False,
        )
        evaluate(options, console)
        _, answers = read_answers(Path(scratch) / ANSWERS)
    return {one.cell: one for one in answers}


def ask_lmms_eval(way: Way, task: Path, folder: Path, server: Server | None, console: Console) -> Answers:
    """Answers of lmms-eval; `server` is for ways that ask one."""
    place: dict[str, Any] = dict(ENGINE) if server is None else {"base_url": f"{server.base_url}/v1"}
    console.print(f"lmms-eval --model {way.model}: {way.title}")
    return run_lmms_eval(way.model, {"model": MODEL, **place, **way.arguments}, task, folder / way.name)


if __name__ == "__main__":
    typer.run(main)
