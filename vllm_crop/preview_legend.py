# SPDX-License-Identifier: Apache-2.0
"""The looks that occur in a preview, and the legend that explains them."""

from dataclasses import dataclass
from enum import Enum

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vllm_crop.plan_summary import PlanSummary
from vllm_crop.preview_tokens import KEPT_LINE, PATCH_LINE, faded, shaded

Colour = tuple[int, int, int]

REGION_COLOUR: Colour = (255, 45, 120)
BAR_COLOUR: Colour = (20, 23, 29)
TEXT_COLOUR: Colour = (244, 246, 250)
MARGIN = 22


class Swatch(Enum):
    """What the legend can explain."""

    REGION = "region"
    KEPT = "kept: one token per cell"
    POOLED = "pooled: one token per patch"
    EVICTED = "evicted: seen below layer"
    LEFT_OUT = "left out"
    UNSEEN = "not seen by the model"


@dataclass(frozen=True)
class LegendEntry:
    """One look with its meaning; `stage` of `num_stages` is for what is evicted."""

    swatch: Swatch
    label: str
    stage: int = 0
    num_stages: int = 1


def legend_of(summary: PlanSummary, outlined: bool, cut_away: bool) -> list[LegendEntry]:
    """What occurs in a drawing: whether the region is outlined, and whether the model sees not all of it."""
    occurring = {
        Swatch.REGION: outlined,
        Swatch.KEPT: summary.region_kept + summary.others_kept > 0,
        Swatch.POOLED: summary.pooled > 0,
        Swatch.EVICTED: bool(summary.evicted),
        Swatch.LEFT_OUT: summary.left_out > 0,
        Swatch.UNSEEN: cut_away,
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
    if entry.swatch is Swatch.REGION:
        sample = Image.new("RGB", sample.size, BAR_COLOUR)
        ImageDraw.Draw(sample).rectangle((1, 1, 32, 24), outline=REGION_COLOUR, width=4)
    elif entry.swatch is Swatch.KEPT:
        draw.line((17, 0, 17, 26), fill=KEPT_LINE[0], width=1)
        draw.line((0, 13, 34, 13), fill=KEPT_LINE[0], width=1)
    elif entry.swatch is Swatch.POOLED:
        draw.rectangle((0, 0, 17, 26), fill=(118, 170, 214))
        draw.rectangle((18, 0, 34, 26), fill=(150, 158, 110))
        draw.line((17, 0, 17, 26), fill=PATCH_LINE[0], width=PATCH_LINE[1])
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
