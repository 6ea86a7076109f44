# SPDX-License-Identifier: Apache-2.0
"""Which layers look at what a question is about, without labels: their maps change with the question.

A layer that looks at the same places whatever is asked says nothing about the question. D_l is the mean, over
pictures and pairs of questions about one picture, of 1 - cos of the two maps of layer l; those with at least
half of the largest are taken.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
SHARE = 0.5  # of the largest change


def changes(maps: FloatArray) -> FloatArray:
    """Of one picture, 1 - cos for every pair of questions and each layer, `[pairs, layers]`, in [0, 1].

    Args:
        maps: `[questions, layers, cells]`, not negative; all zero where a layer did not look at the picture.
    """
    lengths = np.linalg.norm(maps, axis=-1, keepdims=True)
    directions = np.divide(maps, lengths, out=np.zeros_like(maps), where=lengths > 0)
    first, second = np.triu_indices(len(maps), k=1)
    cosines = (directions[first] * directions[second]).sum(-1)
    # What is not there does not change.
    seen = (lengths[first] > 0)[..., 0] & (lengths[second] > 0)[..., 0]
    return np.asarray(np.where(seen, 1 - cosines, 0.0).clip(0, 1))


def question_change(pictures: Iterable[FloatArray]) -> FloatArray:
    """D_l, `[layers]`: how much each layer's map changes with the question.

    Args:
        pictures: the maps of each.

    Raises:
        ValueError: no picture has two questions.
    """
    pairs = [changes(maps) for maps in pictures if len(maps) > 1]
    if not pairs:
        raise ValueError("no picture has two questions to compare")
    return np.asarray(np.concatenate(pairs).mean(0))


def looking_layers(change: FloatArray, layers: Sequence[int]) -> list[int]:
    """Those of `layers` whose maps change at least half as much as the one that changes most, ascending.

    Args:
        change: D_l of each, in the same order.

    Raises:
        ValueError: none changes at all.
    """
    most = float(change.max())
    if not most > 0:
        raise ValueError("no layer looks elsewhere for another question")
    return sorted(layer for layer, much in zip(layers, change, strict=True) if much >= SHARE * most)
