# SPDX-License-Identifier: Apache-2.0
"""Cards: signs, price labels, clocks, forms and lists, as they are drawn. Rows have a name and a value."""

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Kind = Literal["sign", "label", "clock", "form", "list"]
Colour = tuple[int, int, int]
Pixels = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Style:
    """How cards of a kind look.

    Attributes:
        stacked: a row's value stands below its name and larger, else beside it.
        papers: background colours.
    """

    stacked: bool
    papers: tuple[Colour, ...]
    name: Colour
    value: Colour


STYLES: dict[Kind, Style] = {
    "sign": Style(True, ((18, 74, 148), (12, 104, 66), (122, 30, 38)), (255, 255, 255), (255, 255, 255)),
    "label": Style(True, ((255, 236, 130), (250, 250, 246)), (40, 40, 40), (176, 14, 24)),
    "clock": Style(True, ((28, 28, 32), (52, 56, 66)), (214, 214, 214), (255, 170, 60)),
    "form": Style(False, ((252, 250, 244), (242, 246, 252)), (84, 84, 84), (16, 24, 90)),
    "list": Style(False, ((34, 44, 40), (22, 32, 62)), (176, 194, 186), (255, 186, 72)),
}
_LARGER = 1.5  # a stacked value's letters, of the name's
_LINE, _PADDING, _GAP = 1.5, 0.7, 1.6  # line height, edge and space between columns, in letters' heights


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        rows: name and value of each.
        letters: height of the letters in pixels.
        paper: its background colour.
    """

    kind: Kind
    rows: tuple[tuple[str, str], ...]
    letters: int
    paper: Colour

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        edge = 2 * _PADDING * self.letters
        if STYLES[self.kind].stacked:
            width = max(max(self._name_width(name), self._value_width(value)) for name, value in self.rows)
        else:
            names, values = self._columns()
            width = names + _GAP * self.letters + values
        return round(width + edge), round(len(self.rows) * self._row_height() + edge)

    def boxes(self, left: float, top: float) -> list[Pixels]:
        """Where each row is, name and value with the space around, of a card at this place."""
        width, edge, height = self.size[0], _PADDING * self.letters, self._row_height()
        tops = [top + edge + index * height for index in range(len(self.rows))]
        return [(left, y, left + width, y + height) for y in tops]

    def draw(self, canvas: ImageDraw.ImageDraw, left: float, top: float) -> None:
        """Draw it, its upper left corner at this place."""
        style, (width, height), letters = STYLES[self.kind], self.size, self.letters
        outline = tuple(channel // 2 for channel in self.paper)
        canvas.rounded_rectangle(
            (left, top, left + width, top + height), letters // 3, self.paper, outline, max(1, letters // 10)
        )
        for (name, value), (x0, y0, x1, _) in zip(self.rows, self.boxes(left, top), strict=True):
            x, name_font, value_font = x0 + _PADDING * letters, _font(letters), self._value_font()
            if style.stacked:
                canvas.text(((x0 + x1) / 2, y0), name, style.name, name_font, anchor="ma")
                below = y0 + _LINE * letters
                canvas.text(((x0 + x1) / 2, below), value, style.value, value_font, anchor="ma")
            else:
                canvas.text((x, y0), name, style.name, name_font)
                canvas.text((x + self._columns()[0] + _GAP * letters, y0), value, style.value, value_font)

    def _row_height(self) -> float:
        lines = 1 + _LARGER if STYLES[self.kind].stacked else 1
        return lines * _LINE * self.letters

    def _columns(self) -> tuple[float, float]:
        return (
            max(self._name_width(name) for name, _ in self.rows),
            max(self._value_width(value) for _, value in self.rows),
        )

    def _name_width(self, name: str) -> float:
        return _font(self.letters).getlength(name)

    def _value_width(self, value: str) -> float:
        return self._value_font().getlength(value)

    def _value_font(self) -> ImageFont.FreeTypeFont:
        return _font(round(self.letters * _LARGER) if STYLES[self.kind].stacked else self.letters)


def draw_background(size: tuple[int, int], chance: random.Random) -> Image.Image:
    """Walls and windows of muted colours: something to look at that no question is about."""
    picture = Image.new("RGB", size, _muted(chance))
    canvas = ImageDraw.Draw(picture)
    longer = max(size)
    for _ in range(40):
        width, height = (chance.uniform(0.03, 0.25) * longer for _ in range(2))
        x, y = chance.uniform(-0.1, 1) * size[0], chance.uniform(-0.1, 1) * size[1]
        canvas.rectangle((x, y, x + width, y + height), _muted(chance), _muted(chance), 2)
    return picture


def _muted(chance: random.Random) -> Colour:
    level = chance.randint(90, 190)
    red, green, blue = (level + chance.randint(-25, 25) for _ in range(3))
    return red, green, blue


def _font(letters: int) -> ImageFont.FreeTypeFont:
    # The one that Pillow carries, where it was built with FreeType: the same letters on every machine.
    font = ImageFont.load_default(size=letters)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
