# SPDX-License-Identifier: Apache-2.0
"""The rival CoViPAL's module: its training, its file, and the gates that its second stage trains through."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from lab.evaluation.covipal import training
from lab.evaluation.covipal.module import MOST_WORDS, PruningModule, read_module
from lab.evaluation.covipal.training import Stage, Training
from lab.tinyvqa.training.batches import Task
from lab.tinyvqa.training.forward import PREFIX, Probes, language_states, make_layout

CHECKPOINT = Path("lab/checkpoints/tinyvqa")
SMALL = Task(8, (8, 12), scenes=1, questions=4, weights={"read": 1.0, "compare": 1.0})


@pytest.fixture(scope="module")
def model() -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT)


@pytest.fixture
def begun(model: Any, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(training, "TASK", SMALL)
    return Training(model, AutoTokenizer.from_pretrained(CHECKPOINT))


def test_it_learns_where_a_deep_layer_looks(begun: Training) -> None:
    """One batch, again and again; attention itself is the target, so the least loss is its entropy."""
    batch = begun.maker.make(SMALL, 1)
    optimizer = torch.optim.AdamW(begun.module.parameters(), 3e-3)
    losses, shares = [], []
    for _ in range(30):
        loss, share = begun.foretelling(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        shares.append(share)
    assert losses[-1] < losses[0] - 1
    assert shares[-1] > shares[0] + 0.2


def test_the_answers_reach_the_module_and_not_the_model(begun: Training) -> None:
    loss, right = begun.answering(begun.maker.make(SMALL, 1), 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert 0 <= right <= 1
    assert all(part.grad is not None for part in begun.module.blocks.parameters())
    assert float(begun.module.score.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert all(part.grad is None for part in begun.model.parameters())


def test_a_whole_training_writes_what_the_rival_reads(begun: Training, tmp_path: Path) -> None:
    begun.run((Stage("attention", 2, 1e-3), Stage("answers", 2, 1e-3)), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("attention", 2), ("answers", 2)]
    read = read_module(tmp_path / "model.safetensors")
    for name, part in begun.module.state_dict().items():
        assert torch.equal(read.state_dict()[name], part), name


def test_words_matter_and_padding_does_not() -> None:
    torch.manual_seed(0)
    module, features, words = PruningModule(16).eval(), torch.randn(1, 12, 16), torch.randn(1, 5, 16)
    alone = module(features, 3, words, torch.zeros(1, 5, dtype=torch.bool))
    longer = torch.cat([words, torch.randn(1, 4, 16)], dim=1)
    padding = torch.arange(9)[None] >= 5
    assert torch.allclose(module(features, 3, longer, padding), alone, atol=1e-6)
    assert not torch.allclose(module(features, 3, longer, padding & False), alone, atol=1e-3)
    assert not torch.allclose(module(features, 3, words.flip(1), padding[:, :5]), alone, atol=1e-3)
    assert not torch.allclose(module(features, 4, words, padding[:, :5]), alone, atol=1e-3)  # another shape
    assert max(SMALL.length, 24) <= MOST_WORDS


@torch.inference_mode()
def test_a_closed_gate_hides_a_token_from_its_question_alone(model: Any) -> None:
    torch.manual_seed(0)
    language, layout = model.model.language_model, make_layout(3, 4, 2, 6, torch.device("cpu"))
    image, asked = torch.randn(1, 12, 128), torch.randint(20, 200, (1, 2, 6))
    probes = Probes((), torch.zeros(1, 2, dtype=torch.long))

    def states(gates: torch.Tensor | None, shown: torch.Tensor = image) -> torch.Tensor:
        prefix = torch.tensor([1, 2])
        return language_states(language, prefix, shown, asked, layout, probes, gates=gates).last[0]

    open_gates, closed = torch.zeros(1, 2, 12), torch.zeros(1, 2, 12)
    closed[0, 0, -1] = float("-inf")  # the last token, which no other visual token sees
    plain, hidden = states(None), states(closed)
    assert torch.equal(states(open_gates), plain)
    assert torch.equal(hidden[1], plain[1])
    assert not torch.allclose(hidden[0], plain[0], atol=1e-3)
    # Hidden, it may be anything.
    other = image.clone()
    other[0, -1] = torch.randn(128)
    assert torch.allclose(states(closed, other)[0], hidden[0], atol=1e-5)
    assert not torch.allclose(states(None, other)[0], plain[0], atol=1e-3)
    assert PREFIX == 2
