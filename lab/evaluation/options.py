# SPDX-License-Identifier: Apache-2.0
"""What is asked of one evaluation, and what its conditions have in common."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.evaluation.conditions import CROP_METHODS, Condition
from lab.evaluation.questions import SPLITS, Split
from lab.evaluation.tuned import Tuning
from vllm_crop.errors import CropError

Engine = Literal["vllm", "transformers"]
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


class CheckpointError(CropError):
    """The checkpoint cannot be evaluated."""


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        engine: what answers everything but rivals, which need the transformers runner.
        base_url: an endpoint that answers instead.
        eviction_layers: of CROP's ilp and plc+ilp.
        tuning: where the configurations of rivals come from; None: the first that can meet a rate.
        times: whether times to first token are measured, once all is answered.
    """

    model: Path
    per_family: int
    grid: tuple[Condition, ...]
    engine: Engine
    base_url: str | None
    eviction_layers: tuple[int, ...]
    split: Split
    folder: Path
    tuning: Tuning | None = None
    times: bool = True

    @property
    def prunes(self) -> bool:
        """Whether some condition needs the plugin."""
        return any(condition.method in CROP_METHODS for condition in self.grid)

    def engine_for(self, condition: Condition) -> str:
        """The name of what answers a condition."""
        if condition.chooses_tokens:
            return "transformers"
        return "endpoint" if self.base_url else self.engine

    def crop_settings(self) -> dict[str, Any]:
        """The plugin's settings: prepared for every method; positions as in the unpruned prompt; no rim."""
        layers = list(self.eviction_layers)
        return {"method": "plc", "eviction_layers": layers, "position_ids": "original", "rim": 0}

    def settings(self) -> dict[str, Any]:
        """What the conditions of one table must share."""
        shared = shared_settings(self.model, self.per_family, self.split)
        return {**shared, "eviction_layers": list(self.eviction_layers)}


def shared_settings(model: Path, per_family: int, split: Split) -> dict[str, Any]:
    """What the conditions of any table must share.

    Raises:
        CheckpointError: as of `weights_hash`.
    """
    return {
        "weights": weights_hash(model),
        "per_family": per_family,
        "split": split,
        "seed": SPLITS[split],
    }


def weights_hash(model: Path) -> str:
    """SHA-256 of a checkpoint's weights, so that a newer training is not taken for an older one.

    Raises:
        CheckpointError: there is none, or of another architecture.
    """
    config, weights = model / "config.json", model / "model.safetensors"
    if not (config.exists() and weights.exists()):
        raise CheckpointError(
            f"{model} has no config.json and model.safetensors. Give a checkpoint with --model, or train "
            "one: python -m lab.tinyvqa.training --out build/tinyvqa"
        )
    found = json.loads(config.read_text()).get("architectures")
    if found != [ARCHITECTURE]:
        raise CheckpointError(f"{model} is {found}; the evaluation knows {ARCHITECTURE} so far")
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
