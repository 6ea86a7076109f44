# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-crop`; a module beside this one for each subcommand."""

import typer

from vllm_crop.commands.bench import bench
from vllm_crop.commands.calibrate import calibrate
from vllm_crop.commands.check import check
from vllm_crop.commands.compare import compare
from vllm_crop.commands.plan import plan
from vllm_crop.commands.preview import preview

app = typer.Typer(
    name="vllm-crop",
    help="Question-guided visual token pruning for vLLM: look at plans, check an installation, measure.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (check, plan, preview, compare, bench, calibrate):
    app.command()(command)


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate() -> None:
    """Say where accuracy is measured: in a clone of the repository, with its model and its scenes."""
    typer.echo(
        "The evaluation is part of the repository and not of the installed package. In a clone of it: "
        "python -m lab.evaluation --help",
        err=True,
    )
    raise typer.Exit(1)
