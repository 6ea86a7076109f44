# SPDX-License-Identifier: Apache-2.0
"""Pictures of scenes. What stands on a thing can be read at full size, and not in the thumbnail."""

import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lab.tinyvqa.scenes import Scene, Thing

CELL = 48  # pixels: 3x3 visual tokens at full size
THUMBNAIL = 16  # pixels of a cell in the thumbnail: one visual token
_SMOOTHING = 2  # drawn this much larger, then scaled down

_COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 205),
    "yellow": (235, 205, 40),
    "purple": (140, 50, 165),
    "orange": (240, 130, 30),
}
_DIGIT_HEIGHT = 13  # points
_Point = tuple[float, float]


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene, `side * CELL` pixels wide and high; the same for the same scene."""
    chance = random.Random(scene.seed)
    width = scene.side * CELL * _SMOOTHING
    image = _background(scene.seed, width)
    draw = ImageDraw.Draw(image)
    _clutter(draw, chance, width, 3 * scene.side)
    for thing in scene.things:
        _draw_thing(draw, thing, chance)
    image = image.resize((scene.side * CELL,) * 2, Image.Resampling.BOX)
    return _with_noise(image, scene.seed)


def thumbnail(image: Image.Image) -> Image.Image:
    """What a scene is located on."""
    size = (image.width * THUMBNAIL // CELL, image.height * THUMBNAIL // CELL)
    return image.resize(size, Image.Resampling.BOX)


def _background(seed: int, width: int) -> Image.Image:
    """A smooth wash of greyish colours."""
    coarse = np.random.default_rng(seed).integers(120, 200, (4, 4, 1)) + np.random.default_rng(
        seed + 1
    ).integers(-18, 18, (4, 4, 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize((width, width), Image.Resampling.BILINEAR)


def _clutter(draw: ImageDraw.ImageDraw, chance: random.Random, width: int, amount: int) -> None:
    """Grey lines, arcs and letters, which mean nothing."""
    for _ in range(amount):
        x, y, grey = chance.uniform(0, width), chance.uniform(0, width), chance.randint(90, 215)
        reach, kind = chance.uniform(0.2, 1.0) * CELL * _SMOOTHING, chance.randrange(3)
        ink = (grey, grey, grey)
        if kind == 0:
            end = (x + chance.uniform(-reach, reach), y + chance.uniform(-reach, reach))
            draw.line([(x, y), end], fill=ink, width=_SMOOTHING)
        elif kind == 1:
            start = chance.randrange(360)
            draw.arc([x, y, x + reach, y + reach], start, start + 140, fill=ink, width=_SMOOTHING)
        else:
            letter = chance.choice("ACEFHKLMNPRTUVXYZ")
            draw.text((x, y), letter, fill=ink, font=_font(_DIGIT_HEIGHT * _SMOOTHING), anchor="mm")


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, chance: random.Random) -> None:
    unit = CELL * _SMOOTHING
    (row, col), (dx, dy) = thing.cell, thing.offset
    x, y, radius = (col + 0.5 + dx) * unit, (row + 0.5 + dy) * unit, thing.size * unit / 2
    fill = tuple(min(255, max(0, part + chance.randint(-15, 15))) for part in _COLOURS[thing.colour])
    outline = tuple(part // 2 for part in fill)
    if thing.shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill, outline, _SMOOTHING)
    else:
        draw.polygon([(x + radius * px, y + radius * py) for px, py in _OUTLINES[thing.shape]], fill, outline)
    low = radius * 0.25 if thing.shape == "triangle" else 0.0  # where it is wide enough
    ink = (250, 250, 250) if chance.random() < 0.5 else (15, 15, 15)
    draw.text((x, y + low), thing.digit, fill=ink, font=_font(_DIGIT_HEIGHT * _SMOOTHING), anchor="mm")


_ARM = 0.38
_OUTLINES: dict[str, list[_Point]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)],
    "cross": [
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ],
}


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _with_noise(image: Image.Image, seed: int) -> Image.Image:
    pixels = np.asarray(image, dtype=np.int16)
    noise = np.random.default_rng(seed + 2).integers(-14, 15, pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
