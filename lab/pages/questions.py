# SPDX-License-Identifier: Apache-2.0
"""Questions about drawn pages in the format of `vllm-crop compare`: the same number of every family."""

import json
import random
from pathlib import Path

from lab.pages.asking import FAMILIES, ask
from lab.pages.browser import PixelBox
from lab.pages.store import read_pages

PER_PAGE = 2  # questions of a family about one page: few, so that answers are nearly independent


def write_questions(folder: Path, per_family: int) -> Path:
    """Ask about the pages of a folder in turn.

    Raises:
        ValueError: there are too few pages for so many questions.
    """
    left = dict.fromkeys(FAMILIES, per_family)
    lines = []
    for page in read_pages(folder):
        chance = random.Random(page.document.seed)
        name, asked = Path(str(page.picture.filename)).name, set()  # type: ignore[attr-defined]
        for family in FAMILIES:
            for _ in range(PER_PAGE):
                question = ask(page, family, chance) if left[family] else None
                if question is None or question.text in asked:
                    continue
                asked.add(question.text)
                left[family] -= 1
                boxes = [_fractions(box, page.look.size) for box in question.boxes]
                line = {"image": name, "question": question.text, "answer": question.answer}
                lines.append({**line, "family": family, "group": name, "boxes": boxes})
    if any(left.values()):
        raise ValueError(f"too few pages in {folder}: missing {left}")
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def _fractions(box: PixelBox, size: tuple[int, int]) -> list[float]:
    return [round(side / size[axis % 2], 6) for axis, side in enumerate(box)]
