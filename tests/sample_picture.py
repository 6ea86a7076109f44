# SPDX-License-Identifier: Apache-2.0
"""A drawn street scene, for tests of previews."""

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vllm_crop.planning.geometry import Box

Colour = tuple[int, int, int]

_SMOOTHING = 2  # drawn this much larger, then scaled down
_HORIZON = 0.70
_SKY_TOP, _SKY_LOW = (92, 158, 226), (228, 238, 240)
_FACADES = ((205, 122, 92), (226, 196, 140), (152, 172, 186), (196, 150, 160), (172, 184, 140))
_CARS = ((200, 48, 44), (36, 96, 170), (240, 180, 40), (40, 128, 96))
_SIGNS = (("CAFE", "open 7-19"), ("BAKERY", "bread 3.50"), ("BOOKS", "since 1924"), ("HOTEL", "room 24"))
_INK: Colour = (34, 38, 46)

# Where things stand: left, top, right, bottom in units of the short side, from the anchor (fractions).
_ANCHORS = {"sign": (2 / 3, _HORIZON), "car": (0.33, 0.86), "tree": (0.07, 0.76), "person": (0.58, 0.755)}
_EXTENTS = {
    "sign": (-0.12, -0.53, 0.12, -0.29),
    "car": (-0.21, -0.17, 0.21, 0.02),
    "tree": (-0.15, -0.46, 0.15, 0.0),
    "person": (-0.04, -0.20, 0.04, 0.0),
}


def draw_sample_picture(seed: int = 0, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """A street with houses, a sign, a car, a tree and a passer-by; the same picture for the same arguments.

    Args:
        seed: chooses colours, houses, clouds and what the sign says; objects stay where `sample_boxes` says.
        size: width and height in pixels.
    """
    chance = random.Random(seed)
    width, height = size[0] * _SMOOTHING, size[1] * _SMOOTHING
    image = _sky(width, height)
    draw = ImageDraw.Draw(image)
    _draw_clouds(draw, chance, width, height)
    _draw_houses(draw, chance, width, height)
    _draw_street(draw, width, height)
    boxes = {name: _pixels(box, width, height) for name, box in sample_boxes(size).items()}
    _draw_sign(draw, boxes["sign"], height, chance.choice(_SIGNS))
    _draw_tree(draw, boxes["tree"])
    _draw_person(draw, boxes["person"])
    _draw_car(draw, boxes["car"], chance.choice(_CARS))
    return image.resize(size, Image.Resampling.LANCZOS)


def sample_boxes(size: tuple[int, int] = (640, 480)) -> dict[str, Box]:
    """Where the objects are, as fractions of the picture: "sign", "car", "tree", "person"."""
    width, height = size
    unit = min(width, height)
    boxes = {}
    for name, (x, y) in _ANCHORS.items():
        left, top, right, bottom = _EXTENTS[name]
        x0, x1 = x + left * unit / width, x + right * unit / width
        y0, y1 = y + top * unit / height, y + bottom * unit / height
        boxes[name] = Box(max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1))
    return boxes


def _pixels(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    return box.x0 * width, box.y0 * height, box.x1 * width, box.y1 * height


def _sky(width: int, height: int) -> Image.Image:
    gradient = Image.new("L", (width, height), 255)
    gradient.paste(Image.linear_gradient("L").resize((width, round(_HORIZON * height))), (0, 0))
    top, low = Image.new("RGB", (width, height), _SKY_TOP), Image.new("RGB", (width, height), _SKY_LOW)
    return Image.composite(low, top, gradient)


def _draw_clouds(draw: ImageDraw.ImageDraw, chance: random.Random, width: int, height: int) -> None:
    unit = min(width, height)
    draw.ellipse(_around(0.9 * width, 0.12 * height, 0.07 * unit), fill=(255, 226, 120))
    for _ in range(3):
        x, y = chance.uniform(0.05, 0.85) * width, chance.uniform(0.06, 0.2) * height
        for step, radius in enumerate((0.03, 0.045, 0.035)):
            draw.ellipse(_around(x + step * 0.045 * unit, y, radius * unit), fill=(250, 252, 255))


def _draw_houses(draw: ImageDraw.ImageDraw, chance: random.Random, width: int, height: int) -> None:
    unit, x = min(width, height), -0.02 * width
    facade = chance.choice(_FACADES)
    while x < width:
        right = x + chance.uniform(0.22, 0.36) * unit
        top = chance.uniform(0.24, 0.44) * height
        facade = chance.choice([other for other in _FACADES if other != facade])
        draw.rectangle((x, top, right, _HORIZON * height), fill=facade)
        draw.rectangle((x, top, right, top + 0.02 * unit), fill=_shade(facade, 0.7))
        _draw_windows(draw, (x, top, right, _HORIZON * height), unit, chance)
        x = right


def _draw_windows(
    draw: ImageDraw.ImageDraw, house: Sequence[float], unit: float, chance: random.Random
) -> None:
    left, top, right, bottom = house
    columns = max(2, round((right - left) / (0.11 * unit)))
    pitch = (right - left) / columns
    y = top + 0.05 * unit
    while y + 0.075 * unit < bottom - 0.03 * unit:
        for column in range(columns):
            x = left + (column + 0.25) * pitch
            glass = chance.choice(((250, 226, 150), (88, 108, 130), (110, 132, 154)))
            draw.rectangle((x, y, x + 0.5 * pitch, y + 0.065 * unit), fill=glass, outline=(240, 240, 236))
        y += 0.1 * unit


def _draw_street(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, _HORIZON * height, width, height), fill=(178, 176, 172))
    draw.rectangle((0, 0.765 * height, width, height), fill=(78, 82, 90))
    draw.rectangle((0, 0.76 * height, width, 0.772 * height), fill=(214, 212, 206))
    dash = width / 9
    for index in range(9):
        left = (index + 0.2) * dash
        draw.rectangle((left, 0.925 * height, left + 0.55 * dash, 0.94 * height), fill=(236, 232, 214))


def _draw_sign(draw: ImageDraw.ImageDraw, box: Sequence[float], height: int, words: tuple[str, str]) -> None:
    left, top, right, bottom = box
    wide, tall, middle, green = right - left, bottom - top, (left + right) / 2, (24, 92, 72)
    draw.rectangle((middle - 0.03 * wide, bottom, middle + 0.03 * wide, 0.75 * height), fill=(70, 74, 82))
    frame = round(0.035 * wide)
    draw.rounded_rectangle(box, radius=0.08 * wide, fill=(250, 246, 234), outline=green, width=frame)
    upper = (left, top, right, top + 0.56 * tall)
    draw.rounded_rectangle(upper, radius=0.08 * wide, fill=green, corners=(True, True, False, False))
    title, line = words
    _write(draw, (middle, top + 0.29 * tall), title, 0.84 * wide, 0.36 * tall, (255, 255, 255))
    _write(draw, (middle, top + 0.78 * tall), line, 0.8 * wide, 0.24 * tall, _INK)


def _write(
    draw: ImageDraw.ImageDraw,
    middle: tuple[float, float],
    text: str,
    wide: float,
    tall: float,
    colour: Colour,
) -> None:
    """Centre a text, as large as the given width and height allow."""
    natural = ImageFont.load_default(100)
    size = min(100 * wide / natural.getlength(text), tall)
    font = ImageFont.load_default(max(1.0, size))
    draw.text(middle, text, fill=colour, font=font, anchor="mm", stroke_width=size / 30, stroke_fill=colour)


def _draw_tree(draw: ImageDraw.ImageDraw, box: Sequence[float]) -> None:
    left, top, right, bottom = box
    wide, tall, middle = right - left, bottom - top, (left + right) / 2
    draw.rectangle((middle - 0.06 * wide, top + 0.5 * tall, middle + 0.06 * wide, bottom), fill=(110, 78, 56))
    for x, y, radius, green in (
        (0.28, 0.42, 0.26, (58, 122, 66)),
        (0.72, 0.4, 0.27, (52, 112, 62)),
        (0.5, 0.26, 0.32, (78, 146, 78)),
        (0.44, 0.2, 0.12, (108, 172, 96)),
    ):
        draw.ellipse(_around(left + x * wide, top + y * tall, radius * wide), fill=green)


def _draw_person(draw: ImageDraw.ImageDraw, box: Sequence[float]) -> None:
    left, top, right, bottom = box
    wide, tall, middle = right - left, bottom - top, (left + right) / 2
    for side in (-1, 1):
        foot = middle + side * 0.22 * wide
        draw.line(
            (middle + side * 0.1 * wide, top + 0.55 * tall, foot, bottom), fill=_INK, width=round(0.2 * wide)
        )
    body = (middle - 0.3 * wide, top + 0.22 * tall, middle + 0.3 * wide, top + 0.62 * tall)
    draw.rounded_rectangle(body, radius=0.2 * wide, fill=(232, 140, 52))
    draw.ellipse(_around(middle, top + 0.11 * tall, 0.23 * wide), fill=(236, 196, 168))


def _draw_car(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: Colour) -> None:
    left, top, right, bottom = box
    wide, tall = right - left, bottom - top

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * wide, top + y * tall

    draw.ellipse((*at(0.0, 0.86), *at(1.0, 1.02)), fill=(58, 61, 68))
    draw.polygon([at(0.2, 0.44), at(0.33, 0.06), at(0.68, 0.06), at(0.84, 0.44)], fill=_shade(colour, 0.86))
    draw.polygon([at(0.27, 0.42), at(0.36, 0.13), at(0.49, 0.13), at(0.49, 0.42)], fill=(196, 222, 236))
    draw.polygon([at(0.53, 0.42), at(0.53, 0.13), at(0.66, 0.13), at(0.77, 0.42)], fill=(196, 222, 236))
    draw.rounded_rectangle((*at(0.02, 0.4), *at(0.98, 0.82)), radius=0.15 * tall, fill=colour)
    draw.rectangle((*at(0.02, 0.62), *at(0.98, 0.68)), fill=_shade(colour, 0.75))
    draw.ellipse(_around(*at(0.955, 0.53), 0.05 * tall), fill=(255, 240, 180))
    for x in (0.22, 0.78):
        draw.ellipse(_around(*at(x, 0.8), 0.2 * tall), fill=_INK)
        draw.ellipse(_around(*at(x, 0.8), 0.09 * tall), fill=(190, 194, 200))


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (round(channel * factor) for channel in colour)
    return red, green, blue
