# SPDX-License-Identifier: Apache-2.0
"""Scenes to ask real models about: cards of several sizes anywhere on a picture, a question for each row.

Letters are large enough for the picture at full size and too small for a thumbnail, so that a model must look
at the right place.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from vllm_crop.calibrating.cards import STYLES, Card, Kind, Pixels, draw_background
from vllm_crop.planning.geometry import Box

SIDE = 1024  # pixels of the longer side
_ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2)
_CARDS = 6, 9
_TRIES = 80  # until a card is left out
_GAP = 0.01  # of the longer side, between cards
# Letters' heights as fractions of the longer side: continuous between these.
_LETTERS: dict[Kind, tuple[float, float]] = {
    **{"sign": (0.011, 0.026), "label": (0.01, 0.024), "clock": (0.011, 0.026)},
    **{"form": (0.011, 0.018), "list": (0.011, 0.018)},
}
_ROWS: dict[Kind, tuple[int, int]] = {
    **{"sign": (1, 1), "label": (1, 1), "clock": (1, 1)},
    **{"form": (3, 5), "list": (3, 6)},
}
_NAMES: dict[Kind, tuple[str, ...]] = {
    "sign": (
        *("Maple Road", "Harbour Street", "Mill Lane", "Station Road", "Church Hill", "Park Avenue"),
        *("Bridge Street", "Garden Row", "Castle Walk", "River Close", "Queen Square", "Forest Drive"),
    ),
    "label": (
        *("apples", "bread", "coffee", "cheese", "tomatoes", "honey", "olive oil", "rice", "butter"),
        *("grapes", "yoghurt", "walnuts", "lentils", "green tea"),
    ),
    "clock": ("Oslo", "Tokyo", "Lima", "Cairo", "Delhi", "Sydney", "Toronto", "Nairobi", "Seoul", "Athens"),
    "form": (
        *("Surname", "Order number", "Account", "Postcode", "Phone", "Room", "Membership", "Licence"),
        *("Invoice", "Locker", "Policy", "Ticket"),
    ),
    "list": (
        *("Lisbon", "Vienna", "Geneva", "Porto", "Bergen", "Malmo", "Turin", "Krakow", "Bremen", "Dublin"),
        *("Seville", "Antwerp", "Gdansk"),
    ),
}
_SURNAMES = ("Moreno", "Okafor", "Lindqvist", "Tanaka", "Haddad", "Petrov", "Silva", "Novak", "Keller", "Ito")
_QUESTIONS: dict[Kind, str] = {
    "sign": "What number is on the sign of {name}?",
    "label": "What do the labels say is the price of {name}?",
    "clock": "What time does the clock of {name} show?",
    "form": "What does the form say for {name}?",
    "list": "At what time is the departure to {name}?",
}
_PLURALS: dict[Kind, str] = {
    **{"sign": "street signs", "label": "price labels", "clock": "clocks"},
    **{"form": "forms", "list": "departure lists"},
}


class Question(NamedTuple):
    """A question with its answer.

    Attributes:
        box: what has to be seen, in fractions of the picture; None for all of it.
    """

    text: str
    answer: str
    box: Box | None


@dataclass(frozen=True)
class Scene:
    """Cards with their upper left corners in pixels, on a background that `seed` draws."""

    size: tuple[int, int]
    cards: tuple[tuple[Card, tuple[float, float]], ...]
    seed: int

    def picture(self) -> Image.Image:
        """The picture at full size, RGB."""
        picture = draw_background(self.size, random.Random(self.seed))
        canvas = ImageDraw.Draw(picture)
        for card, (left, top) in self.cards:
            card.draw(canvas, left, top)
        return picture

    def questions(self, local: int) -> list[Question]:
        """So many about a row, of different cards first, and one about all of the picture.

        Fewer where the scene has fewer rows.
        """
        chance = random.Random(self.seed + 1)
        by_card = [list(self._about(card, place)) for card, place in self.cards]
        for rows in by_card:
            chance.shuffle(rows)
        chance.shuffle(by_card)
        in_turn = [
            rows[turn] for turn in range(max(map(len, by_card))) for rows in by_card if turn < len(rows)
        ]
        kinds = [card.kind for card, _ in self.cards]
        kind = chance.choice(sorted(set(kinds)))
        count = Question(f"How many {_PLURALS[kind]} are there?", str(kinds.count(kind)), None)
        return [*in_turn[:local], count]

    def _about(self, card: Card, place: tuple[float, float]) -> list[Question]:
        width, height = self.size
        return [
            Question(
                _QUESTIONS[card.kind].format(name=name),
                value,
                Box(x0 / width, y0 / height, x1 / width, y1 / height),
            )
            for (name, value), (x0, y0, x1, y1) in zip(card.rows, card.boxes(*place), strict=True)
        ]


def make_scene(seed: int, side: int = SIDE) -> Scene:
    """The scene of a seed: the same for the same arguments.

    Args:
        side: pixels of the picture's longer side.
    """
    chance = random.Random(seed)
    aspect = chance.choice(_ASPECTS)
    size = (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)
    names = {kind: chance.sample(of_kind, len(of_kind)) for kind, of_kind in _NAMES.items()}
    cards: list[tuple[Card, tuple[float, float]]] = []
    taken: list[Pixels] = []
    for _ in range(chance.randint(*_CARDS)):
        card = _make_card(chance, names, side)
        if (place := _free_place(chance, card.size, size, taken, _GAP * side)) is None:
            continue
        cards.append((card, place))
        taken.append((*place, place[0] + card.size[0], place[1] + card.size[1]))
    return Scene(size, tuple(cards), seed)


def _make_card(chance: random.Random, names: dict[Kind, list[str]], side: int) -> Card:
    """No name twice in a scene, so that every question has one answer."""
    kind = chance.choice([kind for kind in STYLES if len(names[kind]) >= _ROWS[kind][1]])
    rows = [names[kind].pop() for _ in range(chance.randint(*_ROWS[kind]))]
    return Card(
        kind,
        tuple((name, _value(chance, kind, name)) for name in rows),
        max(6, round(chance.uniform(*_LETTERS[kind]) * side)),
        chance.choice(STYLES[kind].papers),
    )


def _value(chance: random.Random, kind: Kind, name: str) -> str:
    if kind == "sign":
        return str(chance.randint(2, 399))
    if kind == "label":
        return f"{chance.randint(1, 19)}.{chance.randint(5, 99):02}"
    if kind in ("clock", "list"):
        return f"{chance.randint(0, 23):02}:{chance.randint(0, 59):02}"
    if name == "Surname":
        return chance.choice(_SURNAMES)
    return f"{chance.choice('ABCDEFGHKLMNPRSTUVWXY')}{chance.randint(1000, 9999)}"


def _free_place(
    chance: random.Random,
    card: tuple[int, int],
    picture: tuple[int, int],
    taken: list[Pixels],
    gap: float,
) -> tuple[float, float] | None:
    if card[0] >= picture[0] or card[1] >= picture[1]:
        return None
    for _ in range(_TRIES):
        x, y = chance.uniform(0, picture[0] - card[0]), chance.uniform(0, picture[1] - card[1])
        right, bottom = x + card[0] + gap, y + card[1] + gap
        if all(right < x0 or x > x1 + gap or bottom < y0 or y > y1 + gap for x0, y0, x1, y1 in taken):
            return x, y
    return None
