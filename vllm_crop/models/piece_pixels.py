# SPDX-License-Identifier: Apache-2.0
"""The pixels of one piece of a picture, as resizing all of it would give them, without resizing all of it."""

import math

from PIL import Image

from vllm_crop.planning.foveation import Piece

_SUPPORT = 3  # source pixels on either side of the widest filter (Lanczos), times the reduction


def pixels_of(image: Image.Image, piece: Piece, token_side: int, resample: Image.Resampling) -> Image.Image:
    """Resize and cut a piece out of a picture.

    The same pixels as of the picture resized to its scale and cut then: Pillow's filters see beyond the box
    that they resize, and so much of the picture is left around it.

    Args:
        token_side: pixels of a visual token's side, at every scale.

    Returns:
        RGB, `token_side` pixels for every token of the piece's window.
    """
    row0, row1, col0, col1 = piece.window
    left, right, x0, x1 = _along(image.width, piece.scale.cols, col0, col1, token_side)
    top, bottom, y0, y1 = _along(image.height, piece.scale.rows, row0, row1, token_side)
    part = image.crop((left, top, right, bottom))
    if part.mode != "RGB":  # a picture of another mode is converted as far as it is seen
        part = part.convert("RGB")
    width, height = piece.cols * token_side, piece.rows * token_side
    # First along, then down: in one step Pillow chooses the order by sizes, which differ from the whole's.
    narrow = part.resize((width, part.height), resample, box=(x0 - left, 0, x1 - left, part.height))
    return narrow.resize((width, height), resample, box=(0, y0 - top, width, y1 - top))


def _along(length: int, tokens: int, start: int, end: int, token_side: int) -> tuple[int, int, float, float]:
    """Along one side: the pixels that filters reach, and those that tokens `start..end` show."""
    scale = length / tokens  # source pixels of a token
    first, last = start * scale, min(length, end * scale)
    reach = _SUPPORT * max(1.0, scale / token_side) + 1
    return max(0, math.floor(first - reach)), min(length, math.ceil(last + reach)), first, last
