# SPDX-License-Identifier: Apache-2.0
"""What documents say: tables of names and values, made up with Faker. Plain data; `layouts/` shows it.

A document has one table, or two that look alike ("January" and "February"), and maybe a list of codes that
its values refer to.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from faker import Faker

Values = tuple[str, ...]
CODES = "codes"  # as the list of codes is called where tables have a number


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        kind: "number" can be compared, "word" counted, "code" stands for what the list of codes says.
    """

    name: str
    kind: str


@dataclass(frozen=True)
class Sheet:
    """One table.

    Attributes:
        title: tells it from its twin.
        rows: a name and its values, in the order of the columns.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, Values], ...]


@dataclass(frozen=True)
class Document:
    """All that a page says.

    Attributes:
        kind: "invoice" and the like, which names its layouts.
        heading: the largest line.
        prose: sentences that answer nothing.
        codes: what each code stands for; none where no column has codes.
        seed: also of how it looks.
    """

    kind: str
    heading: str
    prose: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    codes: tuple[tuple[str, str], ...]
    seed: int

    def with_rows(self, rows: Sequence[int], codes: int) -> "Document":
        """The same with the first rows of each table and the first codes: what found room."""
        sheets = tuple(
            replace(sheet, rows=sheet.rows[:count]) for sheet, count in zip(self.sheets, rows, strict=True)
        )
        return replace(self, sheets=sheets, codes=self.codes[:codes])


def make_document(seed: int, kind: str, most_rows: int) -> Document:
    """The document of a seed, with up to `most_rows` rows in all; a page shows what it has room for."""
    chance = random.Random(seed)
    titles, name_of, offered = _KINDS[kind]
    columns = tuple(chance.sample(offered, chance.randint(2, min(4, len(offered)))))
    num_sheets = chance.choice((1, 2))
    names = _distinct(name_of, chance, max(2, most_rows // num_sheets))
    codes = tuple(zip(_distinct(_code, chance, 6), _distinct(_noun, chance, 6), strict=True))
    has_codes = any(column.kind == "code" for column in columns)
    counted = {
        name: chance.sample(words, 3) for name, words in _COUNTED.items()
    }  # few: there is something to count
    sheets = []
    for title in chance.sample(titles, num_sheets):
        # Nearly in the same order: what finds no room is missing from both.
        order = sorted(range(len(names)), key=lambda index: index + chance.uniform(0, 4))
        rows = tuple(
            (names[index], tuple(_value(column, counted, codes, chance) for column in columns))
            for index in order
        )
        sheets.append(Sheet(title, columns, rows))
    heading = f"{chance.choice(_words()[1])} {chance.choice(_words()[2])}".title()
    prose = tuple(_sentence(chance) for _ in range(chance.randint(1, 4)))
    return Document(kind, heading, prose, tuple(sheets), codes if has_codes else (), seed)


@cache
def _words() -> tuple[list[str], ...]:
    """Nouns, adjectives, last names, first names, cities: Faker's, always the same."""
    fake = Faker("en_US")
    fake.seed_instance(0)

    def short(words: Sequence[str], longest: int = 8) -> list[str]:
        return sorted(
            {word for word in words if word.isascii() and word.isalpha() and 2 < len(word) <= longest}
        )

    nouns = short([word.lower() for word in fake.get_words_list(part_of_speech="noun")])
    adjectives = short([word.lower() for word in fake.get_words_list(part_of_speech="adjective")])
    firsts = short([fake.unique.first_name() for _ in range(300)])
    fake.unique.clear()
    lasts = short([fake.unique.last_name() for _ in range(500)])
    cities = short([fake.city() for _ in range(3000)], 10)
    return nouns, adjectives, lasts, firsts, cities


def texts() -> list[str]:
    """All words that documents are made of, for a tokenizer to learn from."""
    columns = [column.name for _, _, offered in _KINDS.values() for column in offered]
    titles = [title for titles, _, _ in _KINDS.values() for title in titles]
    counted = [word for words in _COUNTED.values() for word in words]
    return [*(word for words in _words() for word in words), *columns, *titles, *counted]


def _noun(chance: random.Random) -> str:
    return chance.choice(_words()[0])


def _product(chance: random.Random) -> str:
    return f"{chance.choice(_words()[1][::7])} {chance.choice(_words()[0][::3])}"  # few: twins share a word


def _person(chance: random.Random) -> str:
    return f"{chance.choice(_words()[3])} {chance.choice(_words()[2])}"


def _city(chance: random.Random) -> str:
    return chance.choice(_words()[4])


def _code(chance: random.Random) -> str:
    return chance.choice("ABCDEFGHKLMNPRST") + str(chance.randint(1, 99))


def _distinct(make: Callable[[random.Random], str], chance: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(chance)] = None
    return list(found)


def _value(
    column: Column,
    counted: Mapping[str, Sequence[str]],
    codes: Sequence[tuple[str, str]],
    chance: random.Random,
) -> str:
    if column.kind == "word":
        return chance.choice(counted[column.name])
    if column.kind == "code":
        return chance.choice(codes)[0]
    if column.name in _TIMES:
        return f"{chance.randint(0, 23):02d}:{chance.randint(0, 59):02d}"
    if column.name in _DECIMALS:
        return f"{chance.randint(1, 99)}.{chance.randint(0, 9)}{chance.randint(0, 9)}"
    return str(chance.randint(1, 10 ** chance.randint(1, 3)))


def _sentence(chance: random.Random) -> str:
    nouns, adjectives = _words()[:2]
    return (
        f"The {chance.choice(adjectives)} {chance.choice(nouns)} of {chance.choice(nouns)} "
        f"and {chance.choice(nouns)} was {chance.choice(adjectives)}."
    )


def _number(name: str) -> Column:
    return Column(name, "number")


_COUNTED = {
    "colour": ("red", "blue", "green", "grey", "black", "white", "brown", "pink"),
    "state": ("open", "paid", "late", "new", "sent", "lost", "done", "ready"),
}
_TIMES = ("arrival", "departure")
_DECIMALS = ("price", "amount", "weight")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August")
_SHOPS = ("North", "South", "East", "West", "Centre", "Harbour")
_GOODS = (
    _number("price"),
    _number("amount"),
    _number("stock"),
    Column("place", "code"),
    Column("colour", "word"),
)
_PEOPLE = (
    _number("room"),
    _number("phone"),
    _number("hours"),
    Column("team", "code"),
    Column("state", "word"),
)
# By kind: titles of tables, what names a row, and which columns there may be.
_KINDS: dict[str, tuple[tuple[str, ...], Callable[[random.Random], str], tuple[Column, ...]]] = {
    "invoice": (_MONTHS, _product, _GOODS),
    "receipt": (_SHOPS, _product, _GOODS),
    "pricelist": (_SHOPS, _product, _GOODS),
    "form": (_SHOPS, _person, _PEOPLE),
    "labels": (
        _SHOPS,
        _city,
        (_number("weight"), _number("parcels"), Column("gate", "code"), Column("state", "word")),
    ),
    "timetable": (
        ("weekdays", "Sundays", "holidays"),
        _city,
        (_number("arrival"), _number("departure"), _number("platform"), Column("note", "code")),
    ),
    "dashboard": (
        _MONTHS,
        _person,
        (
            _number("sales"),
            _number("calls"),
            _number("visits"),
            Column("goal", "code"),
            Column("state", "word"),
        ),
    ),
    "chart": (_MONTHS, _city, (_number("sales"), _number("visits"))),
}
KINDS = tuple(_KINDS)
