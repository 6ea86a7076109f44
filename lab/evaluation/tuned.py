# SPDX-License-Identifier: Apache-2.0
"""What the tuning has found: the configuration of every rival at every rate, and what else was tried."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lab.evaluation.stats import Estimate
from vllm_crop.benchmarking.report import write_json

TUNING = Path(__file__).parent / "results" / "tuning.json"


@dataclass(frozen=True)
class Tried:
    """One configuration at one rate.

    Attributes:
        accuracy: on local questions; None where it was not asked.
        asked: how many questions.
        impossible: why it cannot meet the rate.
        divergence: mean of VTW's measure, in nats; of other methods None.
    """

    configuration: str
    accuracy: Estimate | None = None
    asked: int = 0
    impossible: str | None = None
    divergence: float | None = None


@dataclass(frozen=True)
class Tuned:
    """A method at a rate; `chosen` is None where no configuration can meet it."""

    method: str
    pruning_rate: float
    chosen: str | None
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Tuning:
    """All of it.

    Attributes:
        provenance: versions, revision, command and settings of the last run.
        earlier: the same of runs before it, whose findings may have been kept.
    """

    provenance: Mapping[str, Any]
    methods: tuple[Tuned, ...]
    earlier: tuple[Mapping[str, Any], ...] = ()

    def configuration(self, method: str, rate: float) -> str | None:
        """What was chosen; None where nothing was tried."""
        found = self._find(method, rate)
        return found.chosen if found else None

    def beside(self, known: "Tuning | None") -> "Tuning":
        """With what only an earlier tuning has, method by rate, if it asked the same model the same."""
        if known is None or known.provenance.get("settings") != self.provenance.get("settings"):
            return self
        here = {(one.method, one.pruning_rate) for one in self.methods}
        others = tuple(one for one in known.methods if (one.method, one.pruning_rate) not in here)
        if not others:
            return self
        return Tuning(self.provenance, others + self.methods, (*known.earlier, known.provenance))

    def number_tried(self, method: str, rate: float) -> int:
        """How many configurations could meet the rate and were asked."""
        found = self._find(method, rate)
        return sum(one.accuracy is not None for one in found.tried) if found else 0

    def _find(self, method: str, rate: float) -> Tuned | None:
        same = (one for one in self.methods if (one.method, one.pruning_rate) == (method, rate))
        return next(same, None)


def choose(tried: Sequence[Tried]) -> str | None:
    """The configuration with the highest accuracy; of equals the first, which is the published one."""
    measured = [one for one in tried if one.accuracy is not None]
    best = max(measured, key=lambda one: one.accuracy.value if one.accuracy else 0.0, default=None)
    return best.configuration if best else None


def write_tuning(path: Path, tuning: Tuning) -> None:
    """As JSON."""
    write_json(path, asdict(tuning))


def read_tuning(path: Path) -> Tuning:
    """The inverse."""
    return TypeAdapter(Tuning).validate_json(path.read_text())
