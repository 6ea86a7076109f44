# SPDX-License-Identifier: Apache-2.0
"""How pages look: layouts, fonts, sizes. What one split shows, no other does."""

import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

# Debian's names; which packages bring them is in lab/pages/README.md.
FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("DejaVu Sans", "DejaVu Serif", "Liberation Sans", "Liberation Serif", "Lato", "Roboto", "Cabin"),
        *("Caladea", "Carlito", "Comfortaa", "DejaVu Sans Mono", "Courier Prime", "Linux Libertine O"),
    ),
    "dev": ("Open Sans", "EB Garamond", "Hack"),
    "test": ("Inter", "Cantarell", "Liberation Mono", "Roboto Condensed", "Quicksand"),
}
# Layouts by the kinds of documents they can show; the others' files are never drawn for a split.
LAYOUTS: dict[Split, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "train": (
        ("table", ("invoice", "pricelist", "form", "dashboard", "timetable")),
        ("slip", ("receipt", "labels")),
        ("cards", ("labels", "form", "dashboard")),
        ("bars", ("chart",)),
    ),
    "dev": (("ledger", ("invoice", "form", "pricelist")), ("tiles", ("labels", "receipt"))),
    "test": (
        ("across", ("timetable", "pricelist")),
        ("letter", ("invoice", "receipt")),
        ("badges", ("labels", "form")),
        ("columns", ("chart",)),
        ("screen", ("dashboard",)),
    ),
}
# Pictures that are trained on are whole windows of the vision tower; those that are tested have any size.
TRAINING_SIZES = ((320, 256), (384, 256), (384, 320), (320, 448), (448, 320), (512, 384), (640, 448))
_LEAST, _MOST = (400, 300), (720, 560)


@dataclass(frozen=True)
class Look:
    """How one page looks.

    Attributes:
        layout: the template's name.
        size: of the picture, width and height in pixels.
        style: what templates ask for: colours, rules, distances.
    """

    layout: str
    kind: str
    size: tuple[int, int]
    style: dict[str, str | int | float | bool]


def make_look(seed: int, split: Split) -> Look:
    """The look of a seed."""
    chance = random.Random(f"{split} {seed}")
    layout, kinds = chance.choice(LAYOUTS[split])
    size = (
        chance.choice(TRAINING_SIZES)
        if split == "train"
        else (chance.randint(_LEAST[0], _MOST[0]), chance.randint(_LEAST[1], _MOST[1]))
    )
    dark = chance.random() < 0.15
    hue = chance.randrange(360)
    style: dict[str, str | int | float | bool] = {
        "font": chance.choice(FONTS[split]),
        "font_size": chance.choice((10, 11, 11, 12, 12, 13, 14)),
        "line": round(chance.uniform(1.2, 1.7), 2),
        "pad": chance.randint(1, 9),
        "margin": chance.randint(3, 22),
        "align": chance.choice(("left", "right", "center")),
        "rules": chance.choice(("none", "rows", "all", "zebra")),
        "capital_headers": chance.random() < 0.3,
        "bold_names": chance.random() < 0.3,
        "ink": _hsl(hue, chance.randint(0, 60), chance.randint(80, 96) if dark else chance.randint(4, 26)),
        "paper": _hsl(
            chance.randrange(360),
            chance.randint(0, 40),
            chance.randint(8, 18) if dark else chance.randint(90, 100),
        ),
        "shade": f"hsla({hue}, 50%, 50%, {chance.uniform(0.08, 0.25):.2f})",
        "accent": _hsl(hue, 60, 70 if dark else 35),
        "prose_first": chance.random() < 0.6,
        "codes_first": chance.random() < 0.3,
        "beside": chance.random() < 0.3,
        "shift": chance.randint(0, 15),
        "columns": chance.randint(2, 3),
    }
    return Look(layout, chance.choice(kinds), size, style)


def _hsl(hue: int, saturation: int, lightness: int) -> str:
    return f"hsl({hue}, {saturation}%, {lightness}%)"
