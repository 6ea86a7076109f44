# SPDX-License-Identifier: Apache-2.0
"""Caption, legend and colours of the preview's picture."""

from enum import Enum

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vllm_crop.plan import TokenPlan
from vllm_crop.plan_summary import PlanSummary
from vllm_crop.preview_tokens import KEPT_LINE, PATCH_LINE, faded

Colour = tuple[int, int, int]

REGION_COLOUR: Colour = (255, 45, 120)

_BAR: Colour = (20, 23, 29)
_TEXT: Colour = (244, 246, 250)
_QUIET: Colour = (160, 168, 180)
_SAVED: Colour = (92, 214, 150)
_MARGIN = 22
_MIN_WIDTH = 750


class Swatch(Enum):
    """What the legend can explain."""

    REGION = "region"
    KEPT = "kept: one token per cell"
    POOLED = "pooled: one token per patch"
    LEFT_OUT = "left out"
    UNSEEN = "not seen by the model"


def unseen(picture: Image.Image) -> Image.Image:
    """What preprocessing cuts away: dark and hatched."""
    grey = Image.blend(picture, ImageOps.grayscale(picture).convert("RGB"), 0.6)
    dark = Image.blend(grey, Image.new("RGB", picture.size, _BAR), 0.62)
    lines = Image.blend(dark, Image.new("RGB", picture.size, (120, 128, 140)), 0.35)
    return Image.composite(lines, dark, _hatching(picture.size))


def _hatching(size: tuple[int, int]) -> Image.Image:
    smooth, pitch = 2, 18
    width, height = size[0] * smooth, size[1] * smooth
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for start in range(-height, width, pitch * smooth):
        draw.line((start, height, start + height, 0), fill=255, width=2 * smooth)
    return mask.resize(size, Image.Resampling.BOX)


def add_caption(
    drawing: Image.Image, summary: PlanSummary, plan: TokenPlan, swatches: list[Swatch]
) -> Image.Image:
    """Put the drawing above a bar with the counts and the legend."""
    width = max(drawing.width, _MIN_WIDTH)
    bar = _bar(width, summary, plan, swatches)
    whole = Image.new("RGB", (width, drawing.height + bar.height), _BAR)
    whole.paste(drawing, ((width - drawing.width) // 2, 0))
    whole.paste(bar, (0, drawing.height))
    return whole


def _bar(width: int, summary: PlanSummary, plan: TokenPlan, swatches: list[Swatch]) -> Image.Image:
    bar = Image.new("RGB", (width, 400), _BAR)
    draw = ImageDraw.Draw(bar)
    big, small = ImageFont.load_default(34), ImageFont.load_default(20)
    x, y = _MARGIN, 20
    draw.text((x, y), str(summary.tokens), fill=_QUIET, font=big, stroke_width=0.5)
    x += round(big.getlength(str(summary.tokens))) + 14
    _arrow(draw, x, y + 23)
    x += 50
    after = f"{summary.embeddings} tokens"
    draw.text((x, y), after, fill=_TEXT, font=big, stroke_width=0.8)
    draw.text((width - _MARGIN, y), summary.change, fill=_SAVED, font=big, anchor="ra", stroke_width=0.8)
    y += 50
    counts = summary.describe()
    grid = f"{plan.grid.rows} x {plan.grid.cols} grid, pruning rate {plan.pruning_rate:.4g}"
    draw.text((_MARGIN, y), counts, fill=_TEXT, font=small)
    if small.getlength(counts) + small.getlength(grid) + 3 * _MARGIN <= width:
        draw.text((width - _MARGIN, y), grid, fill=_QUIET, font=small, anchor="ra")
    else:
        y += 30
        draw.text((_MARGIN, y), grid, fill=_QUIET, font=small)
    y += 40
    draw.line((_MARGIN, y, width - _MARGIN, y), fill=(52, 58, 68), width=1)
    bottom = _legend(bar, y + 16, swatches)
    return bar.crop((0, 0, width, bottom + 16))


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.line((x, y, x + 24, y), fill=_QUIET, width=4)
    draw.polygon([(x + 22, y - 8), (x + 35, y), (x + 22, y + 8)], fill=_QUIET)


def _legend(bar: Image.Image, top: int, swatches: list[Swatch]) -> int:
    """Write the entries, in as many lines as they need; returns where they end."""
    font = ImageFont.load_default(17)
    draw = ImageDraw.Draw(bar)
    x, y = _MARGIN, top
    for swatch in swatches:
        wide = 44 + round(font.getlength(swatch.value)) + 26
        if x > _MARGIN and x + wide - 26 > bar.width - _MARGIN:
            x, y = _MARGIN, y + 36
        bar.paste(_symbol(swatch), (x, y))
        draw.text((x + 44, y + 13), swatch.value, fill=_TEXT, font=font, anchor="lm")
        x += wide
    return y + 26


def _symbol(swatch: Swatch) -> Image.Image:
    """A 34 x 26 sample of how this looks in the drawing."""
    sample = _sample()
    draw = ImageDraw.Draw(sample, "RGBA")
    if swatch is Swatch.REGION:
        sample = Image.new("RGB", sample.size, _BAR)
        ImageDraw.Draw(sample).rectangle((1, 1, 32, 24), outline=REGION_COLOUR, width=4)
    elif swatch is Swatch.KEPT:
        draw.line((17, 0, 17, 26), fill=KEPT_LINE[0], width=1)
        draw.line((0, 13, 34, 13), fill=KEPT_LINE[0], width=1)
    elif swatch is Swatch.POOLED:
        draw.rectangle((0, 0, 17, 26), fill=(118, 170, 214))
        draw.rectangle((18, 0, 34, 26), fill=(150, 158, 110))
        draw.line((17, 0, 17, 26), fill=PATCH_LINE[0], width=PATCH_LINE[1])
    elif swatch is Swatch.LEFT_OUT:
        sample = faded(sample)
    else:
        sample = unseen(sample)
    return sample


def _sample() -> Image.Image:
    """A little landscape."""
    sample = Image.new("RGB", (34, 26), (122, 182, 236))
    draw = ImageDraw.Draw(sample)
    draw.ellipse((22, 3, 29, 10), fill=(255, 222, 110))
    draw.polygon([(0, 26), (0, 17), (10, 8), (20, 19), (27, 13), (34, 19), (34, 26)], fill=(84, 142, 84))
    return sample
