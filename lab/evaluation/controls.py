# SPDX-License-Identifier: Apache-2.0
"""What a user would do without pruning: a smaller picture, or a thumbnail with the part that matters."""

import math

from PIL import Image

from vllm_crop.families.qwen_vl import SmartResize
from vllm_crop.planning.geometry import Region


def near_square(tokens: int, aspect: float = 1.0) -> tuple[int, int]:
    """Rows and columns nearest to `tokens` in number, of about the aspect (width by height)."""
    ideal = math.sqrt(tokens / aspect)
    candidates = {
        (rows, cols)
        for rows in (max(1, math.floor(ideal)), math.ceil(ideal))
        for cols in (max(1, math.floor(rows * aspect)), math.ceil(rows * aspect), round(rows * aspect) + 1)
    }
    return min(candidates, key=lambda size: (abs(size[0] * size[1] - tokens), size))


def resized(picture: Image.Image, tokens: int, resize: SmartResize) -> Image.Image:
    """The picture at about this many visual tokens."""
    rows, cols = near_square(max(tokens, resize.min_tokens), picture.width / picture.height)
    return picture.resize((cols * resize.token_side, rows * resize.token_side), Image.Resampling.BOX)


def thumbnail_and_crop(
    picture: Image.Image, region: Region, tokens: int, resize: SmartResize
) -> list[Image.Image]:
    """Two images of about `tokens` visual tokens together: the whole, and the region's bounding box.

    The box keeps its resolution unless it would take more than half of the tokens. It is never smaller than
    the processor allows.
    """
    crop = _crop(picture, region, resize)
    wanted = resize.grid(*crop.size).num_tokens
    if wanted > tokens / 2:
        crop = resized(crop, max(resize.min_tokens, tokens // 2), resize)
        wanted = resize.grid(*crop.size).num_tokens
    return [resized(picture, tokens - wanted, resize), crop]


def _crop(picture: Image.Image, region: Region, resize: SmartResize) -> Image.Image:
    grid = resize.grid(*picture.size)
    spans = [grid.span(box) for box in region.boxes]
    side = math.ceil(math.sqrt(resize.min_tokens))
    top, bottom = _widened(min(s[0] for s in spans), max(s[1] for s in spans), side, grid.rows)
    left, right = _widened(min(s[2] for s in spans), max(s[3] for s in spans), side, grid.cols)
    edges = (left, top, right, bottom)
    x0, y0, x1, y1 = (resize.token_side * edge for edge in edges)
    return picture.crop((x0, y0, x1, y1))


def _widened(first: int, last: int, least: int, total: int) -> tuple[int, int]:
    """At least `least` of `total` tokens, around the same middle."""
    missing = max(0, least - (last - first))
    first = max(0, min(first - missing // 2, total - least))
    return first, max(last, first + least)
