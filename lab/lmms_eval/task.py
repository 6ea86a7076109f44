# SPDX-License-Identifier: Apache-2.0
"""Writes a folder that lmms-eval takes for a task: pictures, questions, the YAML file and what it calls."""

import json
import shutil
from itertools import chain
from pathlib import Path

from lab.evaluation.question_file import write_questions
from lab.evaluation.questions import SPLITS, Split, make_split
from lab.evaluation.regions import regions_for

NAME = "tinyvqa"
ELSEWHERE = "elsewhere"  # the field with boxes that should not help
_FILES = ("tinyvqa.yaml", "scoring.py")


def write_task(folder: Path, per_family: int, split: Split) -> Path:
    """The folder, for `--include_path`.

    A document has `image` (a file's name), `question`, `answer`, `family`, `boxes` (fractions of the picture;
    none where all of it is needed), and `elsewhere`: boxes of the same size at random places, a control.
    """
    path = write_questions(folder, per_family, SPLITS[split])
    elsewhere = chain.from_iterable(regions_for("random", make_split(split, per_family)))
    documents = [
        json.loads(line) | {ELSEWHERE: region.as_lists() if region else []}
        for line, region in zip(path.read_text(encoding="utf-8").splitlines(), elsewhere, strict=True)
    ]
    path.write_text("".join(f"{json.dumps(one)}\n" for one in documents), encoding="utf-8")
    for name in _FILES:
        shutil.copy(Path(__file__).parent / name, folder)
    return folder
