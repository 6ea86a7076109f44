# SPDX-License-Identifier: Apache-2.0
"""A request for a heat map: what goes to the workers beside its prompt, and what comes back.

The request generates one token. Workers replace its logits by a distribution over the first ids of the
vocabulary, one for each cell of the map, and it asks for the log-probabilities of exactly these ids: the map
takes the way that answers take, through any number of processes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Key of SamplingParams.extra_args, whose values reach the workers.
EXTRA_ARG = "crop_heat"
CELLS, NUM_CELLS, LEAVES, LAYERS, WEIGHTS = "cells", "num_cells", "leaves", "layers", "weights"
# SamplingParams.logprob_token_ids may name 128 ids (vllm/sampling_params.py); two say that it is a map.
MAX_CELLS = 126
# Instead of a token's cell: one that shows nothing of the image (a newline); one on the outer ring, where
# attention gathers that is about nothing there.
NOWHERE, RING = -1, -2
LARGEST_WEIGHT = 100.0
STAMP = 0.5  # the probability of the id after the cells': no model's answer has it
SCALE = 256.0  # heat of a cell is at most 1 and there are at most MAX_CELLS: together less than the stamp
_TOLERANCE = 1e-4

FloatArray = NDArray[np.float64]


class NoHeatError(Exception):
    """What came back is no map."""


def extra_args(
    cells: Sequence[int],
    num_cells: int,
    layers: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    leaves: bool = False,
) -> dict[str, Any]:
    """What the workers must know.

    Args:
        cells: per embedding of the prompt's only image its cell, NOWHERE or RING.
        num_cells: at most MAX_CELLS.
        layers: those of the watched ones that the map is made of; all if left out. With one that nobody
            watches there is no map.
        weights: of these layers, which are ascending then, in the same order: maps are multiplied, each to
            the power of its weight, where otherwise the maximum counts.
        leaves: whether the request may skip the layers after the last one that is watched. No other request
            may find its blocks in the prefix cache then: keys and values of what it skipped are not there.
    """
    asked: dict[str, Any] = {CELLS: list(cells), NUM_CELLS: num_cells, LEAVES: leaves}
    if layers is not None:
        asked[LAYERS] = list(layers)
    if weights is not None:
        asked[WEIGHTS] = list(weights)
    return {EXTRA_ARG: asked}


def token_ids(num_cells: int) -> list[int]:
    """The ids whose log-probabilities are the map: of the cells, the stamp, and what is left."""
    return list(range(num_cells + 2))


def read(logprobs: Mapping[int, Any], num_cells: int) -> FloatArray:
    """The heat of every cell, `[num_cells]`, from a token's log-probabilities by id.

    Raises:
        NoHeatError: the workers made no map of this request.
    """
    # Of a cell that nothing counts for the probability is 0: top log-probabilities may leave its id out.
    given = [logprobs.get(index) for index in token_ids(num_cells)]
    probabilities = np.array([0.0 if one is None else math.exp(min(one.logprob, 0.0)) for one in given])
    if not (abs(probabilities[num_cells] - STAMP) < _TOLERANCE and abs(probabilities.sum() - 1) < _TOLERANCE):
        raise NoHeatError("the answer is no map")
    return probabilities[:num_cells] * SCALE
