# SPDX-License-Identifier: Apache-2.0
"""Cell against cell: CROP's margin over others, and the engine's answers against plain transformers'."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from lab.evaluation.cells import CROP_METHODS, GridCell
from lab.evaluation.questions import TestScene
from lab.evaluation.stats import Estimate, difference
from lab.evaluation.store import CellResult, Store
from lab.evaluation.summary import families_of, right_answers
from lab.tinyvqa.questions import LOCAL


@dataclass(frozen=True)
class Margin:
    """How much more local questions CROP answers right than another method at the same rate, paired."""

    pruning_rate: float
    method: str
    against: str
    gained: Estimate


@dataclass(frozen=True)
class Agreement:
    """How many answers of a cell are word for word those of plain transformers."""

    cell: GridCell
    engine: str
    same: int
    asked: int


def margins(scenes: Sequence[TestScene], results: Sequence[CellResult]) -> list[Margin]:
    """CROP with the model's own regions against all others at the same rate."""
    local = [family in LOCAL for family in families_of(scenes)]
    found = []
    possible = [
        result for result in results if not result.impossible and result.cell.pruning_rate is not None
    ]
    for ours in possible:
        if ours.cell.method not in CROP_METHODS or ours.cell.region != "localizer":
            continue
        for other in possible:
            same_rate = other.cell.pruning_rate == ours.cell.pruning_rate
            if same_rate and other.cell.method not in CROP_METHODS:
                pair = [list(compress(right_answers(scenes, one), local)) for one in (ours, other)]
                assert ours.cell.pruning_rate is not None
                gained = difference(*pair)
                found.append(Margin(ours.cell.pruning_rate, ours.cell.row, other.cell.row, gained))
    return found


def agreements(results: Sequence[CellResult], store: Store) -> list[Agreement]:
    """Of all cells that plain transformers have answered too, in this folder."""
    found = []
    for result in results:
        other = None if result.engine == "transformers" else store.load(result.cell, "transformers")
        if other is not None and result.answers and other.answers:
            pairs = zip(result.answers, other.answers, strict=True)
            same = sum(one.text == two.text for one, two in pairs)
            found.append(Agreement(result.cell, result.engine, same, len(result.answers)))
    return found
