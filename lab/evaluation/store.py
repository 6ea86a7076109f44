# SPDX-License-Identifier: Apache-2.0
"""Finished cells on disk: a run that was stopped goes on where it was, and never mixes settings."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.evaluation.asking import Answer
from lab.evaluation.cells import GridCell
from vllm_crop.benchmarking.report import write_json


@dataclass(frozen=True)
class CellResult:
    """Answers of one cell, in the order of the test set.

    Attributes:
        engine: what answered.
        impossible: why the method cannot meet the rate; there are no answers then.
        ttft_ms: median time to first token, where that means something.
        revision: of the code that measured it; a run that goes on may be newer.
    """

    cell: GridCell
    engine: str
    answers: tuple[Answer, ...] = ()
    seconds: float = 0.0
    ttft_ms: float | None = None
    impossible: str | None = None
    revision: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "CellResult":
        """The inverse."""
        answers = tuple(Answer(**answer) for answer in found["answers"])
        return cls(**{**found, "cell": GridCell(**found["cell"]), "answers": answers})


@dataclass(frozen=True)
class Store:
    """A folder of cells; `settings` are what the cells of a table must have in common."""

    folder: Path
    settings: dict[str, Any]

    def load(self, cell: GridCell, engine: str) -> CellResult | None:
        """The result of a cell, if it was measured with the same settings."""
        path = self._path(cell, engine)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return CellResult.from_json(found["result"]) if found["settings"] == self.settings else None

    def save(self, result: CellResult) -> None:
        """Write a result, all of it or nothing."""
        path = self._path(result.cell, result.engine)
        write_json(path, {"settings": self.settings, "result": result.to_json()})

    def _path(self, cell: GridCell, engine: str) -> Path:
        return self.folder / "cells" / f"{engine}-{cell.slug}.json"
