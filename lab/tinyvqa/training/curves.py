# SPDX-License-Identifier: Apache-2.0
"""Draws a training: `python -m lab.tinyvqa.training.curves LOG -o curves.png`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.tinyvqa.questions import FAMILIES

PANELS: dict[str, dict[str, str]] = {
    "vision tower: tokens told right": {
        f"{name} ({kind})": f"{kind} {name}"
        for kind, names in (("full", ("colour", "shape", "digit")), ("thumbnail", ("colour", "shape")))
        for name in names
    },
    "answers on pictures of 8x8 cells": {family: f"answer 8 {family}" for family in FAMILIES},
    "answers on pictures of 4x4 cells": {family: f"answer 4 {family}" for family in FAMILIES},
    "places told exactly, on thumbnails": {family: f"locate 8 {family}" for family in FAMILIES},
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`, in the order they were written."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def points_of(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Line numbers and values of a figure, where it was measured."""
    found = [(index, line[key]) for index, line in enumerate(lines, start=1) if key in line]
    return [index for index, _ in found], [value for _, value in found]


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with all panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 8), sharey=True)
    for axis, (title, curves) in zip(axes.flat, PANELS.items(), strict=True):
        for label, key in curves.items():
            axis.plot(*points_of(lines, key), label=label)
        axis.set_title(title)
        axis.set_xlabel("line of the log (50 steps each)")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(
    log: Annotated[Path, typer.Argument(help="The log.jsonl of a training.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the PNG.")] = Path(
        "curves.png"
    ),
) -> None:
    """Draw the shares of right answers over a training."""
    draw(read_log(log), output)


if __name__ == "__main__":
    typer.run(main)
