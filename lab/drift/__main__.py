# SPDX-License-Identifier: Apache-2.0
"""`python -m lab.drift OLD NEW`: what a new vLLM changes in what this project relies on."""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lab.drift.comparison import compare
from lab.drift.inventory import changed_architectures, changed_requirements
from lab.drift.names import Names
from lab.drift.reliance import Reliances
from lab.drift.report import Drift, print_drift
from lab.drift.sources import Sources, open_vllm, our_sources
from vllm_crop.compat.points import (
    CPU_RUNNER_POINTS,
    EVICTION_POINTS,
    HEAT_POINTS,
    UPSTREAM_POINTS,
    UpstreamPoint,
)
from vllm_crop.errors import CropError

POINTS = (*UPSTREAM_POINTS, *EVICTION_POINTS, *HEAT_POINTS, *CPU_RUNNER_POINTS)
_WHICH = "A version, which pip downloads; a wheel; or a folder with `vllm/` in it."

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def drift(
    old: Annotated[str, typer.Argument(help=f"The vLLM this project works with. {_WHICH}")],
    new: Annotated[str, typer.Argument(help=f"The one to follow. {_WHICH}")],
    wheels: Annotated[Path, typer.Option(help="Folder that downloaded wheels are kept in.")] = Path(
        "build/wheels"
    ),
    every: Annotated[bool, typer.Option("--all", help="List what stayed the same, too.")] = False,
    diffs: Annotated[bool, typer.Option(help="Print how bodies changed.")] = True,
) -> None:
    """Compare two vLLMs in everything this project relies on, without importing or installing either.

    Compared is every registered point (`vllm_crop/compat/points/`), and what our sources say beside
    them: names imported from vLLM, methods of its classes that ours override or inherit, attributes of its
    modules, classes and typed arguments, functions that are patched. One of

    * **same**: comments, docstrings and formatting do not count;
    * **body changed**: read the diff. Does it still do what our code next to it expects?
    * **arguments changed**: read how we call or override it;
    * **new**: only the new vLLM has it: a method of that name of ours replaces it from now on;
    * **gone**: with where a name of the same kind is now;
    * **not found**: neither vLLM has it.

    Then the multimodal architectures that came and went, and what must be installed beside vLLM.

    Exit code: 0 nothing changed, 1 something is to be read, 2 something breaks: it is gone or not found, or a
    registered point no longer takes the arguments that are checked at start.
    """
    console = Console(width=None if Console().is_terminal else 160)
    try:
        before, after = (open_vllm(name, wheels) for name in (old, new))
    except CropError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    console.print(f"[bold]{before.title}[/bold] -> [bold]{after.title}[/bold]")
    try:
        found = find_drift(before, after)
    except SyntaxError as error:  # a newer vLLM may be written for a newer Python
        console.print(
            f"[red]{escape(str(error.filename))} cannot be read by Python {platform.python_version()}: "
            f"{escape(str(error))}. Run this with a newer one[/red]"
        )
        raise typer.Exit(2) from None
    except Exception:  # 1 would say that there is something to be read
        console.print_exception()
        raise typer.Exit(2) from None
    print_drift(console, found, every, diffs)
    raise typer.Exit(found.severity)


def find_drift(
    old: Sources, new: Sources, root: Path = Path(), points: Iterable[UpstreamPoint] = POINTS
) -> Drift:
    """Compare two vLLMs in what the project in a folder relies on."""
    ours = our_sources(root)
    before, after = Names(old, ours), Names(new, ours)
    relied = Reliances(before).collect(points)
    # What ours would override from now on, without meaning to.
    known = {one.places for one in relied}
    grown = Reliances(after).collect(())
    relied += [one for one in grown if "overridden" in one.ways and one.places not in known]
    findings = [compare(one, before, after) for one in relied]
    return Drift(findings, changed_architectures(before, after), changed_requirements(before, after))


if __name__ == "__main__":
    app()
