# SPDX-License-Identifier: Apache-2.0
"""Questions about a drawn page, each with its answer and the boxes of all that is needed to answer it.

* read: a value by its row and its column.
* twin: the same where two tables have the row and the column; the table is named.
* compare: which of two rows has more.
* follow: what the code in a cell stands for, which stands elsewhere.
* count: how many rows say a word; the highest of a column: the whole page.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lab.pages.browser import Page, PixelBox
from lab.pages.documents import CODES, Sheet

LOCAL = ("read", "twin", "compare", "follow")
FAMILIES = (*LOCAL, "count")
_TRIES = 40


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        boxes: pixels of what it takes to answer; none: the whole page.
    """

    family: str
    text: str
    answer: str
    boxes: tuple[PixelBox, ...]


@dataclass(frozen=True)
class Cell:
    """A value in view.

    Attributes:
        boxes: of the name of its row, of itself and of the name of its column.
    """

    sheet: int
    row: int
    column: int
    boxes: tuple[PixelBox, ...]


def ask(page: Page, family: str, chance: random.Random) -> Question | None:
    """A question of a family, None where the page has none."""
    cells = cells_of(page)
    if not cells:
        return None
    for _ in range(_TRIES):
        found = _MAKERS[family](page, cells, chance)
        if found is not None:
            return found
    return None


def cells_of(page: Page) -> list[Cell]:
    """The values of all tables that are in view with the names of their row and column."""
    return [
        Cell(s, r, c, boxes)
        for s, sheet in enumerate(page.document.sheets)
        for r in range(len(sheet.rows))
        for c in range(len(sheet.columns))
        if (boxes := _boxes(page.boxes, s, r, c))
    ]


def _boxes(boxes: Mapping[str, PixelBox], s: int, r: int, c: int) -> tuple[PixelBox, ...]:
    header = _header(boxes, s, r, c)
    name, value = boxes.get(f"{s}.{r}.n"), boxes.get(f"{s}.{r}.{c}")
    return () if name is None or value is None or header is None else (name, value, header)


def _header(boxes: Mapping[str, PixelBox], s: int, r: int, c: int) -> PixelBox | None:
    """A column's name: of a row, of the rows from an earlier one on, or of the table."""
    above = (f"{s}.h{start}.{c}" for start in range(r, -1, -1))
    return next((boxes[key] for key in (*above, f"{s}.h.{c}") if key in boxes), None)


def _names(page: Page, cell: Cell) -> tuple[Sheet, str, str, str]:
    """The table, and what the cell's row and column are called and what it says."""
    sheet = page.document.sheets[cell.sheet]
    name, values = sheet.rows[cell.row]
    return sheet, name, sheet.columns[cell.column].name, values[cell.column]


def _twins(page: Page, cell: Cell) -> int:
    """How many tables have this row."""
    _, name, _, _ = _names(page, cell)
    return sum(any(row[0] == name for row in sheet.rows) for sheet in page.document.sheets)


def _in(page: Page, cell: Cell) -> tuple[str, tuple[PixelBox, ...]] | None:
    """What names the table where that is needed, with its box; None where its name is not in view."""
    if len(page.document.sheets) == 1:
        return "", ()
    box = page.boxes.get(f"{cell.sheet}.t")
    return None if box is None else (f" in {page.document.sheets[cell.sheet].title.lower()}", (box,))


def _value(page: Page, cells: list[Cell], chance: random.Random, twins: int, family: str) -> Question | None:
    cell = chance.choice(cells)
    if _twins(page, cell) != twins:
        return None
    _, name, column, value = _names(page, cell)
    place = _in(page, cell) if twins > 1 else ("", ())
    if place is None:
        return None
    return Question(
        family, f"what is the {column} of {name.lower()}{place[0]}?", value.lower(), cell.boxes + place[1]
    )


def _read(page: Page, cells: list[Cell], chance: random.Random) -> Question | None:
    return _value(page, cells, chance, 1, "read")


def _twin(page: Page, cells: list[Cell], chance: random.Random) -> Question | None:
    return _value(page, cells, chance, 2, "twin")


def _compare(page: Page, cells: list[Cell], chance: random.Random) -> Question | None:
    one = chance.choice(cells)
    others = [
        cell for cell in cells if (cell.sheet, cell.column) == (one.sheet, one.column) and cell.row != one.row
    ]
    sheet, name, column, value = _names(page, one)
    place = _in(page, one)
    if not others or place is None or sheet.columns[one.column].kind != "number":
        return None
    other = chance.choice(others)
    _, rival, _, against = _names(page, other)
    if _amount(value) == _amount(against):
        return None
    larger = name if _amount(value) > _amount(against) else rival
    text = f"which has the higher {column}{place[0]}, {name.lower()} or {rival.lower()}?"
    return Question("compare", text, larger.lower(), one.boxes + other.boxes + place[1])


def _follow(page: Page, cells: list[Cell], chance: random.Random) -> Question | None:
    cell = chance.choice(cells)
    sheet, name, column, code = _names(page, cell)
    place = _in(page, cell)
    known = {said: index for index, (said, _) in enumerate(page.document.codes)}
    if sheet.columns[cell.column].kind != "code" or code not in known or place is None:
        return None
    boxes = [page.boxes.get(f"{CODES}.{known[code]}.{part}") for part in ("n", 0)]
    found = tuple(box for box in boxes if box is not None)
    if len(found) < 2:
        return None
    text = f"what does the {column} of {name.lower()} stand for{place[0]}?"
    meaning = page.document.codes[known[code]][1]
    return Question("follow", text, meaning.lower(), cell.boxes + found + place[1])


def _count(page: Page, cells: list[Cell], chance: random.Random) -> Question | None:
    cell = chance.choice(cells)
    sheet, _, column, value = _names(page, cell)
    place = _in(page, cell)
    if place is None or any(
        _header(page.boxes, cell.sheet, r, cell.column) is None for r in range(len(sheet.rows))
    ):
        return None
    said = [values[cell.column] for _, values in sheet.rows]
    if sheet.columns[cell.column].kind == "word":
        return Question("count", f"how many have the {column} {value}{place[0]}?", str(said.count(value)), ())
    if sheet.columns[cell.column].kind == "number":
        return Question("count", f"what is the highest {column}{place[0]}?", max(said, key=_amount), ())
    return None


def _amount(value: str) -> float:
    """Of a number or a time of the day."""
    return float(value.replace(":", "."))


_MAKERS: dict[str, Callable[[Page, list[Cell], random.Random], Question | None]] = {
    "read": _read,
    "twin": _twin,
    "compare": _compare,
    "follow": _follow,
    "count": _count,
}
