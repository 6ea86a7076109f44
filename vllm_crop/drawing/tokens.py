# SPDX-License-Identifier: Apache-2.0
"""The part of the preview the model sees, drawn token by token."""

from collections.abc import Iterator
from itertools import product

from PIL import Image, ImageDraw, ImageOps

from vllm_crop.planning.geometry import GridPart, TokenGrid
from vllm_crop.planning.plan import NEVER, TokenPlan

PixelBox = tuple[int, int, int, int]
Cell = tuple[int, int]  # row, column

# Colour with opacity, and width in pixels, from the weakest line to the strongest.
LEFT_OUT_LINE = ((255, 255, 255, 40), 1)
KEPT_LINE = ((255, 255, 255, 100), 1)
GROUP_LINE = ((20, 24, 32, 190), 2)
_LINES = (LEFT_OUT_LINE, KEPT_LINE, GROUP_LINE)
_GROUP_OPACITY = 0.86  # a trace of the picture shows what was averaged
# Colour and opacity of the shade, of what is evicted first and of what is evicted last.
_EVICTED_FIRST = (44, 30, 138), 0.8
_EVICTED_LAST = (158, 122, 246), 0.6


def draw_tokens(seen: Image.Image, plan: TokenPlan, part: GridPart | None = None) -> Image.Image:
    """What the model sees: kept tokens sharp, pooled ones in their mean colour, left out ones faded.

    Evicted ones lie in a violet shade, the darker the fewer layers see them. Newlines show nothing.

    Args:
        seen: the part's view of the picture, RGB, of any size.
        plan: what becomes of its tokens.
        part: which of the plan's grids; the first if left out.
    """
    part = part or plan.grid.parts[0]
    grid = part.grid
    means = seen.resize((grid.cols, grid.rows), Image.Resampling.BOX)
    drawing = faded(seen)
    stages = plan.eviction_layers
    for tokens, layer in zip(plan.members(), plan.evicted_from_layer.tolist(), strict=True):
        places = [place for token in tokens if (place := part.cell(token))]
        if not places:
            continue
        colour = _mean_colour(means, places)
        for place in places:
            box = _cell(seen, grid, place)
            cell = seen.crop(box)
            if len(tokens) > 1:
                cell = Image.blend(cell, Image.new("RGB", cell.size, colour), _GROUP_OPACITY)
            if layer != NEVER:
                cell = shaded(cell, stages.index(layer), len(stages))
            drawing.paste(cell, box[:2])
    return _with_lines(drawing, plan, part)


def faded(picture: Image.Image) -> Image.Image:
    """The look of tokens that are left out: grey and pale."""
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, Image.new("RGB", picture.size, (216, 219, 224)), 0.72)


def shaded(picture: Image.Image, stage: int, num_stages: int) -> Image.Image:
    """The look of tokens that are evicted at `stage` in `0..num_stages-1`."""
    lateness = stage / max(1, num_stages - 1)
    (first, first_opacity), (last, last_opacity) = _EVICTED_FIRST, _EVICTED_LAST
    shade = Image.blend(Image.new("RGB", picture.size, first), Image.new("RGB", picture.size, last), lateness)
    return Image.blend(picture, shade, first_opacity + (last_opacity - first_opacity) * lateness)


def _cell(seen: Image.Image, grid: TokenGrid, place: Cell) -> PixelBox:
    row, col = place
    left, right = (round(edge * seen.width / grid.cols) for edge in (col, col + 1))
    top, bottom = (round(edge * seen.height / grid.rows) for edge in (row, row + 1))
    return left, top, right, bottom


def _mean_colour(means: Image.Image, places: list[Cell]) -> tuple[int, int, int]:
    totals = [0.0, 0.0, 0.0]
    for row, col in places:
        pixel = means.getpixel((col, row))
        assert isinstance(pixel, tuple)  # RGB
        totals = [total + value for total, value in zip(totals, pixel, strict=True)]
    red, green, blue = (round(total / len(places)) for total in totals)
    return red, green, blue


def _with_lines(drawing: Image.Image, plan: TokenPlan, part: GridPart) -> Image.Image:
    """Lines between neighbours that are not part of the same embedding."""
    assigned, sizes = plan.assignment.tolist(), plan.sizes.tolist()
    kinds = [0 if index < 0 else min(sizes[index], 2) for index in assigned]
    lines: list[list[PixelBox]] = [[] for _ in _LINES]
    for place, beside in _neighbours(part.grid):
        token, neighbour = part.token(*place), part.token(*beside)
        if assigned[token] == assigned[neighbour] >= 0:
            continue
        left, top, _, _ = _cell(drawing, part.grid, beside)
        _, _, right, bottom = _cell(drawing, part.grid, place)
        # The edge both share: the neighbour starts where the token ends, in one of the two directions.
        lines[max(kinds[token], kinds[neighbour])].append((left, top, right, bottom))
    overlay = Image.new("RGBA", drawing.size)
    draw = ImageDraw.Draw(overlay)
    for edges, (colour, width) in zip(lines, _LINES, strict=True):
        for edge in edges:
            draw.line(edge, fill=colour, width=width)
    return Image.alpha_composite(drawing.convert("RGBA"), overlay).convert("RGB")


def _neighbours(grid: TokenGrid) -> Iterator[tuple[Cell, Cell]]:
    """Every place with the one to its right and the one below."""
    for row, col in product(range(grid.rows), range(grid.cols)):
        if col + 1 < grid.cols:
            yield (row, col), (row, col + 1)
        if row + 1 < grid.rows:
            yield (row, col), (row + 1, col)
