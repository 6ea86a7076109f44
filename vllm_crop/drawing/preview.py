# SPDX-License-Identifier: Apache-2.0
"""Draws what a TokenPlan does to a picture, with Pillow alone: the picture of `vllm-crop preview`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from PIL import Image, ImageDraw, ImageOps

from vllm_crop.drawing.looks import BAR_COLOUR, PIECE_COLOUR, REGION_COLOUR, add_caption, legend_of, unseen
from vllm_crop.drawing.tokens import PixelBox, draw_tokens
from vllm_crop.planning.foveation import Piece
from vllm_crop.planning.geometry import Box, GridPart, ImageView, Region
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.planning.summary import PlanSummary

LONG_SIDE = 1000  # of the drawing, in pixels
SHORT_VIEW = 480  # what the model sees is drawn at least this large, so that the grid stays readable
MAX_SIDE = 2400
_GAP = 12  # between the grids of one image
_WHITE = (255, 255, 255)
_PADDING_COLOUR = (127, 127, 127)
_WHITES: dict[str, tuple[float, ...]] = {
    "F": (1.0, 255.0, 65535.0),
    "I": (255.0, 65535.0),
}  # usual values of white, by mode


def draw_preview(
    image: Image.Image,
    view: ImageView,
    plan: TokenPlan,
    region: Region | None,
    num_layers: int = 1,
    pieces: Sequence[Piece] = (),
) -> Image.Image:
    """The picture with its plan drawn in, once for each grid, above a caption with the counts and a legend.

    Args:
        image: as it is sent to the model; of any size and mode.
        view: the part of the upright image that the model sees.
        plan: what becomes of its tokens.
        region: in fractions of the image as sent; None if there is none.
        pieces: what the vision tower sees of it, the view first; empty if that is all of it.
        num_layers: decoder layers of the model; any number will do for a plan that evicts nothing.

    Raises:
        ValueError: the plan evicts at a layer beyond `num_layers`.
    """
    picture = as_rgb(image)
    # A grid that an extremely narrow image leaves without columns has nothing to draw.
    parts = [part for part in plan.grid.parts if part.grid.num_tokens]
    scenes = [_draw_part(picture, view, plan, part, region, pieces[1:]) for part in parts]
    drawing = _side_by_side([scene for scene, _ in scenes])
    summary = PlanSummary.of(plan, view.project(region) if region else None, num_layers)
    cut_away = all(cut for _, cut in scenes)
    return add_caption(drawing, summary, plan, legend_of(summary, region is not None, cut_away, bool(pieces)))


def _draw_part(
    picture: Image.Image,
    view: ImageView,
    plan: TokenPlan,
    part: GridPart,
    region: Region | None,
    pieces: Sequence[Piece],
) -> tuple[Image.Image, bool]:
    """The picture with one of the plan's grids on it, and whether this grid shows not all of the picture."""
    layout = _Layout.of(picture, view.within(part.window))
    scene = layout.scene(picture)
    seen = scene.crop(layout.view_box)
    drawing = unseen(scene)
    drawing.paste(draw_tokens(seen, plan, part), layout.view_box[:2])
    _outline(drawing, layout.view_box, _WHITE, 1)
    for piece in pieces:
        shown = ImageView(view.window).within(piece.shows(piece.window))
        _outline(drawing, layout.place(shown.window), PIECE_COLOUR, 3)
    if region:
        _outline_boxes(drawing, [layout.place(box) for box in region.boxes])
    return drawing, seen.size != scene.size


def draw_region(image: Image.Image, region: Region | None, long_side: int) -> Image.Image:
    """The picture at most `long_side` pixels wide and high, with the region's boxes and no tokens.

    Args:
        image: as it is sent to the model; of any size and mode.
        region: in fractions of the image as sent; None if there is none.
    """
    drawing = as_rgb(image)
    scale = min(1.0, long_side / max(drawing.size))
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    layout = _Layout(drawing.size, (0, 0, width, height), (0, 0, width, height))
    _outline_boxes(drawing, [layout.place(box) for box in region.boxes] if region else [])
    return drawing


def _outline_boxes(drawing: Image.Image, boxes: list[PixelBox]) -> None:
    """Frame a region's boxes, all white rims below all coloured ones."""
    for colour, width, grow in ((_WHITE, 7, 5), (REGION_COLOUR, 5, 4)):
        for box in boxes:
            _outline(drawing, box, colour, width, grow)


def _side_by_side(drawings: list[Image.Image]) -> Image.Image:
    """One drawing as it is; several beside or above each other, whichever is less stretched."""
    if len(drawings) == 1:
        return drawings[0]
    widths, heights = [one.width for one in drawings], [one.height for one in drawings]
    gaps = _GAP * (len(drawings) - 1)
    beside = max(heights) >= max(widths)
    size = (sum(widths) + gaps, max(heights)) if beside else (max(widths), sum(heights) + gaps)
    joined, x, y = Image.new("RGB", size, BAR_COLOUR), 0, 0
    for one in drawings:
        joined.paste(one, (x, y))
        x, y = (x + one.width + _GAP, 0) if beside else (0, y + one.height + _GAP)
    return joined


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture upright, 8 bits per channel, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits, or floats, by the smallest usual range that holds them."""
    values = image.convert("F")
    _, brightest = values.getextrema()
    assert isinstance(brightest, float)  # a single channel
    white = next((limit for limit in _WHITES.get(image.mode, (65535.0,)) if brightest <= limit), brightest)
    return values.point(lambda value: value * (255 / white)).convert("L")


@dataclass(frozen=True)
class _Layout:
    """Where the image and the model's view lie in the drawing, which covers both. In pixels."""

    size: tuple[int, int]
    image_box: PixelBox
    view_box: PixelBox

    @classmethod
    def of(cls, picture: Image.Image, view: ImageView) -> Self:
        width, height = picture.size
        window = view.window
        left, top = min(0.0, window.x0) * width, min(0.0, window.y0) * height
        right, bottom = max(1.0, window.x1) * width, max(1.0, window.y1) * height
        long_side = max(right - left, bottom - top)
        short_view = min((window.x1 - window.x0) * width, (window.y1 - window.y0) * height)
        scale = min(max(LONG_SIDE / long_side, SHORT_VIEW / short_view), MAX_SIDE / long_side)

        def placed(box: Box) -> PixelBox:
            x0, x1 = (round((x * width - left) * scale) for x in (box.x0, box.x1))
            y0, y1 = (round((y * height - top) * scale) for y in (box.y0, box.y1))
            return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)

        image_box, view_box = placed(Box(0, 0, 1, 1)), placed(window)
        size = max(image_box[2], view_box[2]), max(image_box[3], view_box[3])
        return cls(size, image_box, view_box)

    def scene(self, picture: Image.Image) -> Image.Image:
        """The picture at its place, with the padding some image processors add."""
        left, top, right, bottom = self.image_box
        scene = Image.new("RGB", self.size, _PADDING_COLOUR)
        scene.paste(picture.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return scene

    def place(self, box: Box) -> PixelBox:
        """A box given in fractions of the image."""
        left, top, right, bottom = self.image_box
        x0, x1 = (left + round(x * (right - left)) for x in (box.x0, box.x1))
        y0, y1 = (top + round(y * (bottom - top)) for y in (box.y0, box.y1))
        return x0, y0, x1, y1


def _outline(
    drawing: Image.Image, box: PixelBox, colour: tuple[int, int, int], width: int, grow: int = 0
) -> None:
    """Draw a frame around a box, `grow` pixels larger where the drawing has room."""
    left, top, right, bottom = box
    frame = (
        max(left - grow, 0),
        max(top - grow, 0),
        min(right - 1 + grow, drawing.width - 1),
        min(bottom - 1 + grow, drawing.height - 1),
    )
    if frame[0] <= frame[2] and frame[1] <= frame[3]:
        ImageDraw.Draw(drawing).rectangle(frame, outline=colour, width=width)
