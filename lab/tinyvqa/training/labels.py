# SPDX-License-Identifier: Apache-2.0
"""What each visual token of a scene shows."""

from typing import Any

import numpy as np

from lab.tinyvqa.scenes import COLOURS, DIGITS, SHAPES, Scene

IGNORED = -100  # as torch's cross entropy has it
NOTHING = len(COLOURS)


def token_labels(scene: Scene, num_tokens: int) -> Any:
    """`[3, num_tokens, num_tokens]`: colour, shape and digit of the thing that covers a token's centre."""
    labels = np.full((3, num_tokens, num_tokens), IGNORED)
    labels[0] = NOTHING
    centres = (np.arange(num_tokens) + 0.5) * scene.side / num_tokens
    for thing in scene.things:
        (row, col), (dx, dy) = thing.cell, thing.offset
        rows = abs(centres - (row + 0.5 + dy)) <= thing.size / 2
        cols = abs(centres - (col + 0.5 + dx)) <= thing.size / 2
        values = (COLOURS.index(thing.colour), SHAPES.index(thing.shape), DIGITS.index(thing.digit))
        for plane, value in zip(labels, values, strict=True):
            plane[np.ix_(rows, cols)] = value
    return labels
