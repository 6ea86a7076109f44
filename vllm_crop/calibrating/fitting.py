# SPDX-License-Identifier: Apache-2.0
"""Weights of layers, fitted to boxes: a map that is the product of the layers' maps, each to a power.

The map is read as the probability of where to look, and weights are those under which it puts most on the
needed cells: a conditional logit of the layers' log shares, with a ridge penalty that is chosen by leaving
pictures out. Published work regresses on the same log shares; a probability gives windows and confidences
the scale they have for unweighted maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_crop.calibrating.rule import FloatArray

FEWEST = 10  # questions to fit to
PENALTIES = 3.0, 1.0, 0.3, 0.1, 0.03, 0.01
_FOLDS = 5
_STEPS, _SMALL = 100, 1e-6
_LEAST = 1e-6  # share of a cell whose logarithm is taken: less is as good as nothing


@dataclass(frozen=True)
class Example:
    """A question about a place.

    Attributes:
        logs: `[cells, layers]`, of each layer's share of each cell.
        needed: `[cells]`, bool, some and not all of them.
        picture: which it is about.
    """

    logs: FloatArray
    needed: np.ndarray
    picture: int


def example(maps: FloatArray, needed: np.ndarray, picture: int) -> Example | None:
    """From `[layers, cells]` and bool `[cells]`; None where the map cannot tell: all or nothing is needed.

    Cells that no layer looks at, such as a masked ring, are left out.
    """
    shown = maps.max(0) > 0
    if not needed[shown].any() or needed[shown].all() or not (maps.sum(-1) > 0).all():
        return None
    shares = maps[:, shown] / maps[:, shown].sum(-1, keepdims=True)
    return Example(np.log(shares.clip(min=_LEAST)).T, needed[shown], picture)


def fit(examples: Sequence[Example]) -> FloatArray:
    """The weights, `[layers]`.

    Raises:
        ValueError: there are too few examples.
    """
    if len(examples) < FEWEST:
        raise ValueError(f"weights need {FEWEST} questions with boxes or more, there are {len(examples)}")
    return fit_with(examples, best_penalty(examples))


def best_penalty(examples: Sequence[Example]) -> float:
    """Under which weights do best on pictures that were left out; the largest where there is one picture."""
    folds = sorted({one.picture % _FOLDS for one in examples})
    if len(folds) < 2:
        return PENALTIES[0]

    def left_out(penalty: float) -> float:
        total = 0.0
        for fold in folds:
            weights = fit_with([one for one in examples if one.picture % _FOLDS != fold], penalty)
            total += sum(surprise(one, weights) for one in examples if one.picture % _FOLDS == fold)
        return total

    return min(PENALTIES, key=left_out)


def fit_with(examples: Sequence[Example], penalty: float) -> FloatArray:
    """Minimize the mean surprise plus `penalty / 2` times the squared weights."""
    num_layers = examples[0].logs.shape[1]
    weights: FloatArray = np.full(num_layers, 1 / num_layers)
    for _ in range(_STEPS):
        slope, bend = penalty * weights, penalty * np.eye(num_layers)
        for one in examples:
            everywhere = _probabilities(one.logs, weights)
            inside = np.where(one.needed, everywhere, 0.0)
            inside /= inside.sum()
            mean = everywhere @ one.logs
            slope += (mean - inside @ one.logs) / len(examples)
            centred = one.logs - mean
            # An upper bound of the second derivative: every step goes down.
            bend += (centred.T * everywhere) @ centred / len(examples)
        step = np.linalg.solve(bend, slope)
        weights = weights - step
        if np.abs(step).max() < _SMALL:
            break
    return weights


def surprise(one: Example, weights: FloatArray) -> float:
    """Minus the logarithm of the probability that is on needed cells."""
    return -float(np.log(_probabilities(one.logs, weights)[one.needed].sum() + _LEAST))


def _probabilities(logs: FloatArray, weights: FloatArray) -> FloatArray:
    scores = logs @ weights
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())
