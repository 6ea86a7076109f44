# SPDX-License-Identifier: Apache-2.0
"""The size of a small view of an image, which localizers look at and foveated images are seen in."""

import math
from typing import Protocol

from vllm_crop.errors import UnsupportedImageError
from vllm_crop.planning.geometry import ImageTokens, TokenGrid

MOST_DISTORTED = 1.25  # an image seen small may become so much wider or narrower to use its tokens up
_ATTEMPTS = 50  # token counts come in steps: a little smaller each time until they fit


class HasGrid(Protocol):
    """What turns sizes into tokens; see VisionGeometry."""

    def grid(self, width: int, height: int) -> ImageTokens:
        """The visual tokens of an image of this size in pixels."""
        ...


def small_scale(full: TokenGrid, max_tokens: int) -> TokenGrid:
    """As many tokens as an image may cost, of about its aspect and no more than it has along either side.

    Of several with as many tokens that with the truest aspect. Where so few tokens cannot have about its
    aspect, that which distorts it least, and of several the one with most tokens.
    """
    found, best = TokenGrid(1, 1), (False, -math.inf, 0.0)
    for rows in range(1, min(full.rows, max_tokens) + 1):
        truest = rows * full.cols / full.rows
        for wanted in (math.floor(MOST_DISTORTED * truest), round(truest)):
            cols = min(full.cols, max_tokens // rows, max(1, wanted))
            distorted = max(truest / cols, cols / truest)
            near = distorted <= MOST_DISTORTED
            rank = (near, rows * cols, -distorted) if near else (near, -distorted, rows * cols)
            if rank > best:
                found, best = TokenGrid(rows, cols), rank
    return found


def size_for_tokens(geometry: HasGrid, width: int, height: int, max_tokens: int) -> tuple[int, int] | None:
    """The largest size of about the same aspect that costs at most `max_tokens` visual tokens.

    Image processors have a least size: Qwen3-VL's is 64 tokens, and more than that for all but square images.
    One that costs up to twice as much as wanted is taken where there is nothing smaller. None where a smaller
    image does not cost less.
    """
    full = geometry.grid(width, height).num_tokens
    if full <= max_tokens:
        return width, height
    scale = math.sqrt(max_tokens / full)
    least, smallest = min(full, 2 * max_tokens + 1), None
    for _ in range(_ATTEMPTS):
        size = max(1, round(width * scale)), max(1, round(height * scale))
        try:
            tokens = geometry.grid(*size).num_tokens
        except UnsupportedImageError:  # a line so narrow that a smaller one has no pixel across
            break
        if tokens <= max_tokens:
            return size
        if tokens < least:
            least, smallest = tokens, size
        scale *= 0.97
    return smallest
