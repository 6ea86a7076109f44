# SPDX-License-Identifier: Apache-2.0
"""The ways in which lmms-eval asks, each with what our own evaluation calls it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab.demo.setting import BLOCK_SIZE, EVICTION_LAYERS, LOCALIZER
from lab.evaluation.asking import ANSWER_STEPS
from lab.evaluation.conditions import OFF, SERVER, Condition
from lab.lmms_eval.task import ELSEWHERE

# 17 of 576 tokens: so few that pruned answers are not the unpruned ones, and agreeing says something.
RATE = 0.97
CROP = {"pruning_rate": RATE, "eviction_layers": list(EVICTION_LAYERS), "localizer": LOCALIZER}
# Of an answer's length the larger one counts, the task's or this, which is 4096 where it is left out.
ENGINE = {
    **{"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "block_size": BLOCK_SIZE},
    "max_new_tokens": ANSWER_STEPS,
}
SERVER_OPTIONS = (
    *("--plugin", "crop", "--crop-config", json.dumps(CROP), "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "2048", "--block-size", str(BLOCK_SIZE)),
)


@dataclass(frozen=True)
class Way:
    """One way to ask.

    Attributes:
        model: lmms-eval's model that asks in this way, or of ours the one it knows from the entry point.
        condition: what our own evaluation calls it.
        arguments: of the model, beside checkpoint and engine or server.
    """

    title: str
    model: str
    condition: Condition
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of a folder."""
        return f"{self.model}-{self.condition.slug}"

    @property
    def served(self) -> bool:
        """Whether a server answers."""
        return self.model == "openai"


_FOUND = Condition("plc", SERVER, RATE)
_CROP = {"additional_config": {"crop": CROP}}
WAYS = (
    Way("unpruned", "vllm", OFF, {}),
    Way("regions found", "vllm", _FOUND, _CROP),
    Way("regions found", "openai", _FOUND, {"api_key": "none"}),
    Way("the documents' boxes", "crop_oracle", Condition("plc", "oracle", RATE), _CROP),
    Way("boxes elsewhere", "crop_oracle", Condition("plc", "random", RATE), {**_CROP, "boxes": ELSEWHERE}),
)
