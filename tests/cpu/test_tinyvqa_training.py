# SPDX-License-Identifier: Apache-2.0
"""The training's own forward pass is that of transformers, and a training goes on where it stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from lab.tinyvqa import checkpoint, words
from lab.tinyvqa.questions import FAMILIES
from lab.tinyvqa.training import trainer
from lab.tinyvqa.training.batches import Batch, BatchMaker, Task
from lab.tinyvqa.training.forward import LayerSteps, compiled_steps, language_layer, vision_layer
from lab.tinyvqa.training.labels import IGNORED
from lab.tinyvqa.training.language import answer_states, look_loss
from lab.tinyvqa.training.phases import Phase

EACH_FAMILY = dict.fromkeys(FAMILIES, 1.0)
TASKS = {
    "full": Task(3, (3, 6), 2, 4, EACH_FAMILY),
    "thumbnail": Task(8, (8, 12), 2, 4, EACH_FAMILY, locate=True),  # whose windows are of unequal size
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return words.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """Random weights, wide enough that logits depend on everything."""
    torch.manual_seed(0)
    made = Qwen2_5_VLForConditionalGeneration(checkpoint.make_config(tokenizer)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return made


def alone(model: Any, tokenizer: Any, batch: Batch, scene: int, question: int) -> torch.Tensor:
    """What transformers makes of one question and its answer: `[length, vocab]`, in double precision."""
    text = tokenizer.decode(batch.questions[scene, question, 1:])
    prompt = f"{words.START}{words.VISION_START}{words.IMAGE_PAD}{words.VISION_END}{text}"
    picture = Image.fromarray(batch.images[scene].numpy())
    inputs = checkpoint.make_processor(tokenizer)(text=[prompt], images=[picture], return_tensors="pt")
    length = batch.questions.shape[-1]
    assert inputs["input_ids"][0, -length:].tolist() == batch.questions[scene, question].tolist()
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0, -length:]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_questions_that_share_an_image_are_answered_as_if_alone(
    model: Any, tokenizer: Any, name: str
) -> None:
    task = TASKS[name]
    batch = BatchMaker(tokenizer).make(task, seed=1)
    states = answer_states(model, tokenizer, batch, task, train_vision=False)
    got = model.lm_head(states.last).double().log_softmax(-1)
    for scene in range(task.scenes):
        for question in range(task.questions):
            expected = alone(model, tokenizer, batch, scene, question)
            assert float((got[scene, question] - expected).abs().max()) <= 1e-5
    other = alone(model, tokenizer, replace(batch, images=batch.images.flip(0)), 0, 0)
    assert float((got[0, 0] - other).abs().max()) > 0.1  # another picture


@torch.no_grad()
def test_pictures_with_fewer_tokens_keep_the_places_of_those_left(model: Any, tokenizer: Any) -> None:
    task = Task(4, (4, 6), 2, 2, {"read": 1.0}, views=6, pruning_rate=0.75)
    batch = BatchMaker(tokenizer).make(task, seed=5)
    assert batch.kept.shape == (12, 36)
    assert batch.images.shape[0] == 2
    evicting = (batch.assignment < 0).any(1)
    assert evicting.any()
    assert not evicting.all()  # the others are pooled
    full = replace(task, pruning_rate=0.0, views=1, questions=12)
    everything = replace(
        batch,
        questions=batch.questions.view(2, 12, -1),
        answering=batch.answering.view(2, 12),
        assignment=torch.arange(144).expand(2, -1),
        kept=torch.arange(144).expand(2, -1),
    )
    expected = answer_states(model, tokenizer, everything, full, train_vision=False).last
    nothing_lost = answer_states(
        model, tokenizer, everything, replace(full, pruning_rate=0.1), train_vision=False
    ).last
    assert float((nothing_lost - expected).abs().max()) <= 1e-4
    fewer = answer_states(model, tokenizer, batch, task, train_vision=False).last
    assert float((fewer.view_as(expected) - expected).abs().max()) > 0.01


def test_compiled_layers_say_what_they_said(model: Any) -> None:
    """Outputs and gradients, of windows and of both parts of the language model."""
    torch.manual_seed(0)
    steps = compiled_steps()
    tower, language = model.model.visual.blocks[0], model.model.language_model.layers[0]
    width = tower.norm1.weight.shape[0]
    turns = torch.randn(128, model.model.visual.blocks[0].attn.head_dim)
    seen = torch.randn(1, 128, width)
    shown = torch.randn(1, 20 + 2 * 6, language.input_layernorm.weight.shape[0])
    rotation = model.model.language_model.rotary_emb(shown, torch.arange(32).expand(3, 1, -1))
    check_alike(lambda run: run.vision(tower, seen, turns.cos(), turns.sin(), 64), steps, tower)
    check_alike(lambda run: run.language(language, shown, *rotation, 20, 6), steps, language)


def check_alike(run: Any, steps: LayerSteps, layer: Any) -> None:
    """Of a layer, eager and compiled."""
    found = []
    for each in (LayerSteps(vision_layer, language_layer), steps):
        layer.zero_grad()
        made = run(each)
        made.square().mean().backward()
        found.append([made.detach(), *(part.grad.clone() for part in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)
        assert one.abs().sum() > 0


def test_targets_are_the_answers_tokens(tokenizer: Any) -> None:
    for task in TASKS.values():
        batch = BatchMaker(tokenizer).make(task, seed=2)
        for ids, targets, before in zip(
            batch.questions.flatten(0, 1),
            batch.targets.flatten(0, 1),
            batch.answering.flatten(),
            strict=True,
        ):
            answer = targets[targets != IGNORED]
            assert ids[before] == tokenizer.convert_tokens_to_ids(words.ANSWER)
            assert ids[before + 1 :][: len(answer)].tolist() == answer.tolist()
            assert tokenizer.decode(answer).endswith(words.END)


@torch.no_grad()
def test_looks_cover_what_decides(model: Any, tokenizer: Any) -> None:
    task = replace(TASKS["full"], weights={"read": 1.0})
    batch = BatchMaker(tokenizer).make(task, seed=3)
    assert batch.looks.sum(-1).unique().tolist() == [9]  # one cell's tokens
    looked = answer_states(model, tokenizer, batch, task, train_vision=False).looked
    everywhere = replace(batch, looks=torch.ones_like(batch.looks))  # the prefix gets the rest
    assert 0 < float(look_loss(looked, everywhere)) < float(look_loss(looked, batch))


def test_a_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(3, (3, 4), 1, 2, {"read": 1.0})
    phases = (Phase("answers", 4, 1e-3, (task,), look_weight=0.1, train_vision=True),)
    monkeypatch.setattr(trainer, "PHASES", phases)
    monkeypatch.setattr(trainer, "REPORT_EVERY", 2)
    whole = trainer.Trainer(tmp_path / "whole", "cpu")
    whole.run(minutes=10)
    first = trainer.Trainer(tmp_path / "parts", "cpu")
    for _ in range(2):
        first.train_step()
    first.save()
    second = trainer.Trainer(tmp_path / "parts", "cpu")
    assert second.step == 2
    second.run(minutes=10)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert (tmp_path / "parts" / "log.jsonl").read_text().count("\n") == 2
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "parts" / "checkpoint")
    assert torch.equal(loaded.lm_head.weight, second.model.lm_head.weight.half().float())
    third = trainer.Trainer(tmp_path / "third", "cpu")
    third.start_from(tmp_path / "parts" / "checkpoint", "answers")
    assert (third.phase, third.step) == (0, 0)
    assert torch.equal(third.model.lm_head.weight, loaded.lm_head.weight)
