# SPDX-License-Identifier: Apache-2.0
"""What production runs: half precision, FlashAttention, compiled layers and captured graphs.

Rounding moves every answer a little. How much is measured on the same engine with the same pictures and
questions unpruned; pruned answers may be off by little more. Needs a CUDA device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cpu.conftest import SETTINGS, Answer, Engine, Question, ReferenceFor, reference_by
from tests.cpu.test_eviction_parity import SCENARIOS, UNPRUNED, control_for
from tests.families import FAMILIES, Family
from tests.reference import Reference

pytestmark = [
    pytest.mark.vllm_runtime,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE: dict[str, Any] = {
    "attention_backend": "FLASH_ATTN",
    "dtype": "float16",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 30,
    "max_num_seqs": 64,
}
PRUNED = {name: asked for name, asked in SCENARIOS.items() if name not in UNPRUNED}
WHOLE = {name: replace(asked, crop={"method": "off"}) for name, asked in PRUNED.items()}

EngineAndReference = Callable[[Family, str, bool], tuple[Engine, ReferenceFor]]


@pytest.fixture(scope="module")
def engine_and_reference(tmp_path_factory: pytest.TempPathFactory) -> EngineAndReference:
    """Per family, setting and whether graphs are captured."""

    @cache
    def checkpoint_of(family: Family) -> Path:
        folder = family.make_checkpoint(tmp_path_factory.mktemp(str(family)), family.deep)
        return with_rounded_weights(folder, torch.float16)

    @cache
    def reference_of(family: Family) -> ReferenceFor:
        return reference_by(family.reference(checkpoint_of(family)))

    @cache
    def engine_of(family: Family, setting: str, graphs: bool) -> Engine:
        chosen = SETTINGS[setting]
        options = {**DEVICE, "enforce_eager": not graphs, **chosen.options}
        return Engine(checkpoint_of(family), chosen.crop, family, **options)

    return lambda family, setting, graphs: (engine_of(family, setting, graphs), reference_of(family))


def with_rounded_weights(checkpoint: Path, dtype: torch.dtype) -> Path:
    """Round the weights in place, so that the reference computes with those the engine has."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype).float() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint


def error(answer: Answer, reference: Reference) -> float:
    """The largest difference of logprobs, up to where rounding made another token the best."""
    pairs = zip(answer.token_ids, reference.token_ids, strict=True)
    same = next((step for step, (a, b) in enumerate(pairs) if a != b), len(answer.token_ids))
    shown = slice(0, same + 1)  # that step too: it comes after the same text
    return float((answer.logprobs[shown] - reference.logprobs[shown]).abs().max())


def first_step_change(asked: Question, control: Question, of: Callable[[Question], Reference]) -> float:
    """What the mistake of the control changes, in nats."""
    return float((of(control).logprobs[0] - of(asked).logprobs[0]).abs().max())


def assert_little_beside(rounding: list[float], found: list[float], controls: list[float]) -> None:
    """What pruned answers are off by is rounding, and a mistake would be far more."""
    print(
        f"unpruned median {median(rounding):.1e} max {max(rounding):.1e}; "
        f"pruned median {median(found):.1e} max {max(found):.1e}; "
        f"control median {median(controls):.1e} min {min(controls):.1e}"
    )
    assert median(found) <= 2 * median(rounding)
    assert max(found) <= 3 * max(rounding)
    assert median(controls) > 5 * median(found)


@pytest.mark.parametrize("alone", [False, True], ids=["batch", "alone"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("setting", ["evicting", "staged"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_pruning_adds_little_to_the_error_of_rounding(
    engine_and_reference: EngineAndReference, family: Family, setting: str, graphs: bool, alone: bool
) -> None:
    engine, reference_for = engine_and_reference(family, setting, graphs)

    def reference(asked: Question) -> Reference:
        return reference_for(asked, engine.config)

    def ask(asked: Sequence[Question]) -> list[Answer]:
        return [engine.ask(one)[0] for one in asked] if alone else engine.ask(*asked)

    def errors(questions: Mapping[str, Question]) -> list[float]:
        asked = list(questions.values())
        return [error(answer, reference(one)) for one, answer in zip(asked, ask(asked), strict=True)]

    rounding, found = errors(WHOLE), errors(PRUNED)
    controls = [
        first_step_change(asked, control_for(name, asked), reference) for name, asked in PRUNED.items()
    ]
    assert_little_beside(rounding, found, controls)
