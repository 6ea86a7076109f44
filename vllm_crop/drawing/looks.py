# SPDX-License-Identifier: Apache-2.0
"""The looks that occur in a preview, and the legend that explains them."""

from dataclasses import dataclass
from enum import Enum

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vllm_crop.drawing.tokens import GROUP_LINE, KEPT_LINE, faded, shaded
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.planning.summary import PlanSummary

Colour = tuple[int, int, int]

REGION_COLOUR: Colour = (255, 45, 120)
PIECE_COLOUR: Colour = (0, 190, 220)
BAR_COLOUR: Colour = (20, 23, 29)
TEXT_COLOUR: Colour = (244, 246, 250)
MARGIN = 22


class Swatch(Enum):
    """What the legend can explain."""

    REGION = "region"
    KEPT = "kept: one token per cell"
    POOLED = "pooled: one token per group"
    EVICTED = "evicted: seen below layer"
    LEFT_OUT = "left out"
    UNSEEN = "not seen by the model"
    PIECE = "seen larger than the rest"


@dataclass(frozen=True)
class LegendEntry:
    """One look with its meaning; `stage` of `num_stages` is for what is evicted."""

    swatch: Swatch
    label: str
    stage: int = 0
    num_stages: int = 1


def legend_of(
    summary: PlanSummary, outlined: bool, cut_away: bool, in_pieces: bool = False
) -> list[LegendEntry]:
    """What occurs in a drawing.

    Args:
        outlined: whether the region is.
        cut_away: whether the model sees not all of the image.
        in_pieces: whether the vision tower sees parts of it larger than others.
    """
    occurring = {
        Swatch.REGION: outlined,
        Swatch.KEPT: summary.region_kept + summary.others_kept > 0,
        Swatch.POOLED: summary.pooled > 0,
        Swatch.EVICTED: bool(summary.evicted),
        Swatch.LEFT_OUT: summary.left_out > 0,
        Swatch.UNSEEN: cut_away,
        Swatch.PIECE: in_pieces,
    }
    entries = []
    for swatch in (swatch for swatch, occurs in occurring.items() if occurs):
        if swatch is Swatch.EVICTED:
            for stage, (layer, _) in enumerate(summary.evicted):
                entries.append(LegendEntry(swatch, f"{swatch.value} {layer}", stage, len(summary.evicted)))
        else:
            entries.append(LegendEntry(swatch, swatch.value))
    return entries


def draw_legend(bar: Image.Image, top: int, entries: list[LegendEntry]) -> int:
    """Write the entries, in as many lines as they need; returns where they end."""
    font = ImageFont.load_default(17)
    draw = ImageDraw.Draw(bar)
    x, y = MARGIN, top
    for entry in entries:
        wide = 44 + round(font.getlength(entry.label)) + 26
        if x > MARGIN and x + wide - 26 > bar.width - MARGIN:
            x, y = MARGIN, y + 36
        bar.paste(_symbol(entry), (x, y))
        draw.text((x + 44, y + 13), entry.label, fill=TEXT_COLOUR, font=font, anchor="lm")
        x += wide
    return y + 26


def unseen(picture: Image.Image) -> Image.Image:
    """What preprocessing cuts away: dark and hatched."""
    grey = Image.blend(picture, ImageOps.grayscale(picture).convert("RGB"), 0.6)
    dark = Image.blend(grey, Image.new("RGB", picture.size, BAR_COLOUR), 0.62)
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


def _symbol(entry: LegendEntry) -> Image.Image:
    """A 34 x 26 sample of how this looks in the drawing."""
    sample = _sample()
    draw = ImageDraw.Draw(sample, "RGBA")
    if entry.swatch in (Swatch.REGION, Swatch.PIECE):
        colour, width = (REGION_COLOUR, 4) if entry.swatch is Swatch.REGION else (PIECE_COLOUR, 2)
        sample = Image.new("RGB", sample.size, BAR_COLOUR)
        ImageDraw.Draw(sample).rectangle((1, 1, 32, 24), outline=colour, width=width)
    elif entry.swatch is Swatch.KEPT:
        draw.line((17, 0, 17, 26), fill=KEPT_LINE[0], width=1)
        draw.line((0, 13, 34, 13), fill=KEPT_LINE[0], width=1)
    elif entry.swatch is Swatch.POOLED:
        draw.rectangle((0, 0, 17, 26), fill=(118, 170, 214))
        draw.rectangle((18, 0, 34, 26), fill=(150, 158, 110))
        draw.line((17, 0, 17, 26), fill=GROUP_LINE[0], width=GROUP_LINE[1])
    elif entry.swatch is Swatch.EVICTED:
        sample = shaded(sample, entry.stage, entry.num_stages)
    elif entry.swatch is Swatch.LEFT_OUT:
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


_QUIET: Colour = (160, 168, 180)
_SAVED: Colour = (92, 214, 150)
_MIN_WIDTH = 750


def add_caption(
    drawing: Image.Image, summary: PlanSummary, plan: TokenPlan, legend: list[LegendEntry]
) -> Image.Image:
    """Put the drawing above a bar with the counts and the legend."""
    width = max(drawing.width, _MIN_WIDTH)
    bar = _bar(width, summary, plan, legend)
    whole = Image.new("RGB", (width, drawing.height + bar.height), BAR_COLOUR)
    whole.paste(drawing, ((width - drawing.width) // 2, 0))
    whole.paste(bar, (0, drawing.height))
    return whole


def _bar(width: int, summary: PlanSummary, plan: TokenPlan, legend: list[LegendEntry]) -> Image.Image:
    bar = Image.new("RGB", (width, 500), BAR_COLOUR)
    draw = ImageDraw.Draw(bar)
    y = _headline(draw, width, summary)
    small = ImageFont.load_default(20)
    sentences = [summary.describe(), *([summary.describe_layers()] if summary.evicted else [])]
    lines = [line for text in sentences for line in _wrapped(text, small, width - 2 * MARGIN)]
    for line in lines:
        draw.text((MARGIN, y), line, fill=TEXT_COLOUR, font=small)
        y += 30
    grid = f"grid {plan.grid.describe()}, pruning rate {plan.pruning_rate:.4g}"
    if small.getlength(lines[-1]) + small.getlength(grid) + 3 * MARGIN <= width:
        draw.text((width - MARGIN, y - 30), grid, fill=_QUIET, font=small, anchor="ra")
    else:
        draw.text((MARGIN, y), grid, fill=_QUIET, font=small)
        y += 30
    y += 10
    draw.line((MARGIN, y, width - MARGIN, y), fill=(52, 58, 68), width=1)
    bottom = draw_legend(bar, y + 16, legend)
    return bar.crop((0, 0, width, bottom + 16))


def _headline(draw: ImageDraw.ImageDraw, width: int, summary: PlanSummary) -> int:
    """The counts before and after; returns where the next line starts."""
    big = ImageFont.load_default(34)
    x, y = MARGIN, 20
    draw.text((x, y), str(summary.tokens), fill=_QUIET, font=big, stroke_width=0.5)
    x += round(big.getlength(str(summary.tokens))) + 14
    _arrow(draw, x, y + 23)
    draw.text((x + 50, y), summary.after, fill=TEXT_COLOUR, font=big, stroke_width=0.8)
    draw.text((width - MARGIN, y), summary.change, fill=_SAVED, font=big, anchor="ra", stroke_width=0.8)
    return y + 50


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken after commas."""
    lines: list[str] = []
    for part in text.split(", "):
        longer = f"{lines[-1]}, {part}" if lines else part
        if lines and font.getlength(longer) > width:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1:] = [longer]
    return lines


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.line((x, y, x + 24, y), fill=_QUIET, width=4)
    draw.polygon([(x + 22, y - 8), (x + 35, y), (x + 22, y + 8)], fill=_QUIET)
