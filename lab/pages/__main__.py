# SPDX-License-Identifier: Apache-2.0
"""Draws pages, and asks about them: `python -m lab.pages draw train build/pages/train --pages 4000`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from lab.pages.browser import drawer
from lab.pages.looks import Split
from lab.pages.questions import write_questions
from lab.pages.store import PAGES, read_pages, write_page

MODULES = Path("build/pages")

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def draw(
    split: Annotated[Split, typer.Argument(help="Whose layouts and fonts.")],
    folder: Annotated[Path, typer.Argument(help="Where pictures and pages.jsonl go; what is there is kept.")],
    pages: Annotated[int, typer.Option(min=1, help="How many there shall be.")] = 1000,
    modules: Annotated[Path, typer.Option(help="Where `npm install echarts` was called.")] = MODULES,
) -> None:
    """Draw the pages of a split; goes on where it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    done = sum(1 for _ in read_pages(folder)) if (folder / PAGES).exists() else 0
    with drawer(modules) as browser:
        for index in track(range(done, pages), description=split):
            write_page(browser.page(index, split), folder, f"{index}.png")


@app.command()
def ask(
    folder: Annotated[Path, typer.Argument(help="Where pages were drawn; questions.jsonl goes there.")],
    per_family: Annotated[int, typer.Option(min=1, help="Questions of each family.")] = 500,
) -> None:
    """Write questions about drawn pages, as `vllm-crop compare` and `calibrate` read them."""
    typer.echo(write_questions(folder, per_family))


app()
