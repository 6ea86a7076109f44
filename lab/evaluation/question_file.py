# SPDX-License-Identifier: Apache-2.0
"""Writes scenes of the test set as pictures with a JSONL of questions, for `calibrate` and `compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lab.evaluation.questions import make_test_set
from vllm_crop.planning.geometry import GRID_CELLS


def main(
    folder: Annotated[Path, typer.Argument(help="Where pictures and questions.jsonl go.")],
    per_family: Annotated[int, typer.Option(min=1, help="Questions of each of the five families.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 0,
) -> None:
    """Write the test set of a seed."""
    typer.echo(write_questions(folder, per_family, seed))


def write_questions(folder: Path, per_family: int, seed: int) -> Path:
    """The JSONL: image, question, answer, family, boxes; no boxes where a thumbnail cannot tell the place."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, scene in enumerate(make_test_set(per_family, seed)):
        name = f"{index}.png"
        scene.picture().save(folder / name)
        lines += [
            {
                "image": name,
                "question": asked.text,
                "answer": asked.answer,
                "family": asked.family,
                "boxes": asked.region(GRID_CELLS).as_lists() if asked.boxes else [],
            }
            for asked in scene.questions
        ]
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    typer.run(main)
