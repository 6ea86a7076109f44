# SPDX-License-Identifier: Apache-2.0
"""The caption of the preview's picture."""

from PIL import Image, ImageDraw, ImageFont

from vllm_crop.plan import TokenPlan
from vllm_crop.plan_summary import PlanSummary
from vllm_crop.preview_legend import BAR_COLOUR, MARGIN, TEXT_COLOUR, Colour, LegendEntry, draw_legend

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
