# SPDX-License-Identifier: Apache-2.0
"""Finished conditions on disk: a run that was stopped goes on where it was, and never mixes settings."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.evaluation.asking import Answer
from lab.evaluation.conditions import Condition
from vllm_crop.benchmarking.report import write_json


@dataclass(frozen=True)
class ConditionResult:
    """Answers of one condition, in the order of the test set.

    Attributes:
        engine: what answered.
        impossible: why the method cannot meet the rate; there are no answers then.
        revision: of the code that measured it; a run that goes on may be newer.
    """

    condition: Condition
    engine: str
    answers: tuple[Answer, ...] = ()
    seconds: float = 0.0
    impossible: str | None = None
    revision: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "ConditionResult":
        """The inverse."""
        answers = tuple(Answer(**answer) for answer in found["answers"])
        return cls(**{**found, "condition": Condition(**found["condition"]), "answers": answers})


@dataclass(frozen=True)
class Store:
    """A folder of conditions; `settings` are what the conditions of a table must have in common."""

    folder: Path
    settings: dict[str, Any]

    def load(self, condition: Condition, engine: str) -> ConditionResult | None:
        """The result of a condition, if it was measured with the same settings."""
        path = self._path(condition, engine)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        same = found["settings"] == self._settings_of(condition)
        return ConditionResult.from_json(found["result"]) if same else None

    def save(self, result: ConditionResult) -> None:
        """Write a result, all of it or nothing."""
        path = self._path(result.condition, result.engine)
        settings = self._settings_of(result.condition)
        write_json(path, {"settings": settings, "result": result.to_json()})

    def _settings_of(self, condition: Condition) -> dict[str, Any]:
        """A configuration may come to mean something else under the same name."""
        if not condition.chooses_tokens:
            return self.settings
        from lab.evaluation.rivals.registry import arguments_of

        return {**self.settings, "arguments": arguments_of(condition.method, condition.configuration)}

    def _path(self, condition: Condition, engine: str) -> Path:
        return self.folder / "conditions" / f"{engine}-{condition.slug}.json"
