# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.lmms_eval --out DIR` writes tinyvqa as a task of lmms-eval, and does without it."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from lab.evaluation.questions import Split
from lab.lmms_eval.task import NAME, write_task


def main(
    out: Annotated[Path, typer.Option(help="Where the task goes.")],
    per_family: Annotated[int, typer.Option(min=1, help="Questions of each of the five families.")] = 40,
    split: Annotated[Split, typer.Option(help=f"Of {', '.join(get_args(Split))}.")] = "dev",
) -> None:
    """Write the task, and say how it is named."""
    typer.echo(f"--include_path {write_task(out, per_family, split)} --tasks {NAME}")


if __name__ == "__main__":
    typer.run(main)
