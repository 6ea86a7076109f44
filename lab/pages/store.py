# SPDX-License-Identifier: Apache-2.0
"""Drawn pages in a folder: a PNG each, and a line of JSON each with all that the browser said."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lab.pages.browser import Letter, Page
from lab.pages.documents import Column, Document, Sheet
from lab.pages.looks import Look

PAGES = "pages.jsonl"


def write_page(page: Page, folder: Path, name: str) -> None:
    """Write the picture and append the line."""
    page.picture.save(folder / name, optimize=True)
    letters = [[each.letter, round(each.x, 1), round(each.y, 1), int(each.begins)] for each in page.letters]
    boxes = {key: [round(side, 1) for side in box] for key, box in page.boxes.items()}
    line = {"image": name, "document": asdict(page.document), "look": asdict(page.look)}
    with (folder / PAGES).open("a", encoding="utf-8") as pages:
        pages.write(json.dumps({**line, "boxes": boxes, "letters": letters}, separators=(",", ":")) + "\n")


def read_pages(folder: Path) -> Iterator[Page]:
    """The pages, in the order they were written; pictures are read when they are looked at."""
    with (folder / PAGES).open(encoding="utf-8") as lines:
        for line in lines:
            yield _page(json.loads(line), folder)


def _page(said: Any, folder: Path) -> Page:
    document = Document(**said["document"])
    sheets = tuple(
        Sheet(
            sheet["title"],
            tuple(Column(**column) for column in sheet["columns"]),
            tuple((name, tuple(values)) for name, values in sheet["rows"]),
        )
        for sheet in said["document"]["sheets"]
    )
    codes = tuple((code, meaning) for code, meaning in document.codes)
    look = Look(**{**said["look"], "size": tuple(said["look"]["size"])})
    letters = tuple(Letter(letter, x, y, bool(begins)) for letter, x, y, begins in said["letters"])
    boxes = {key: (x0, y0, x1, y1) for key, (x0, y0, x1, y1) in said["boxes"].items()}
    return Page(
        replace(document, prose=tuple(document.prose), sheets=sheets, codes=codes),
        look,
        Image.open(folder / said["image"]),
        boxes,
        letters,
    )
