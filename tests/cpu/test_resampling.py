# SPDX-License-Identifier: Apache-2.0
"""Compressors are trained by the command, go on where they were, and are what a server can name."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lab.evaluation.runner.qwen import QwenRunner
from lab.resampling import memory
from lab.resampling.__main__ import app
from lab.resampling.frozen import FrozenModel, Shown
from lab.resampling.items import TrainingDataError, read_items, scene_items
from lab.resampling.lessons import Course, plan_lesson
from lab.resampling.trainer import Trainer
from tests.conftest import CheckpointOf
from tests.families import LLAVA, QWEN2_5_VL, QWEN2_VL, Family
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT
from vllm_crop.compression.files import read_card
from vllm_crop.compression.resampler import Resampler
from vllm_crop.compression.settings import ResamplerCard, ResamplerShape
from vllm_crop.compression.weights import read_resampler, write_resampler
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import Box, ImageView, Region, TokenGrid

SHAPE = ResamplerShape(feature_size=128, width=32, num_heads=2, mlp_size=32)
COURSE = Course(steps=4, batch=4, cache_gib=0.1)


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return FrozenModel(str(CHECKPOINT), "cpu")


def trainer(model: FrozenModel, out: Path, course: Course = COURSE) -> Trainer:
    return Trainer(model, scene_items(2, 7), SHAPE, course, out)


def test_a_stopped_training_goes_on_as_if_it_had_not(model: FrozenModel, tmp_path: Path) -> None:
    whole = trainer(model, tmp_path / "whole")
    assert whole.run(10)
    stopped = trainer(model, tmp_path / "parts")
    stopped.train_step()
    stopped.train_step()
    stopped.save()
    again = trainer(model, tmp_path / "parts")
    assert again.step == 2
    assert again.run(10)
    for name, part in whole.resampler.state_dict().items():
        assert torch.equal(part, again.resampler.state_dict()[name]), name
    assert whole.resampler.out.weight.detach().any(), "something was learned"
    with pytest.raises(TrainingDataError, match=r"was trained otherwise \(steps\)"):
        trainer(model, tmp_path / "parts", Course(steps=5, batch=4, cache_gib=0.1))
    with pytest.raises(TrainingDataError, match=r"otherwise \(questions\)"):
        Trainer(model, scene_items(3, 7), SHAPE, COURSE, tmp_path / "parts")
    wide = SHAPE.model_copy(update={"width": 64})
    with pytest.raises(TrainingDataError, match=r"otherwise \(sizes\)"):
        Trainer(model, scene_items(2, 7), wide, COURSE, tmp_path / "parts")


def test_a_training_can_begin_with_anothers_weights(model: FrozenModel, tmp_path: Path) -> None:
    resampler = Resampler(SHAPE)
    torch.nn.init.ones_(resampler.out.bias)
    card = ResamplerCard.untrained(SHAPE, "tinyvqa", model.config)
    write_resampler(tmp_path / "first", resampler, card.model_copy(update={"training": {"done": 3}}), "")
    begun = trainer(model, tmp_path / "out")
    begun.start_from(tmp_path / "first")
    assert torch.equal(begun.resampler.out.bias, torch.ones(128))
    begun.train_step()
    begun.save()
    again = trainer(model, tmp_path / "out")
    again.start_from(tmp_path / "elsewhere")  # goes on with what was saved
    assert (again.step, again.started_from) == (1, {"done": 3})
    wide = SHAPE.model_copy(update={"width": 64})
    other = Trainer(model, scene_items(1, 7), wide, COURSE, tmp_path / "wide")
    with pytest.raises(TrainingDataError, match="has other sizes"):
        other.start_from(tmp_path / "first")


@pytest.mark.parametrize("recipe", ["answers", "match"])
def test_it_learns(model: FrozenModel, tmp_path: Path, recipe: Any) -> None:
    """The same few questions again and again at a rate where means say little."""
    course = Course(recipe=recipe, steps=60, batch=6, rates=(0.97,), learning_rate=3e-3)
    items = scene_items(1, 11)[:6]
    one = Trainer(model, items, SHAPE, course, tmp_path)
    one.run(10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss 0.97"] for line in lines]
    print(f"{recipe}: {losses}")
    assert losses[-1] < 0.8 * losses[0]


def test_the_frozen_model_says_what_transformers_says(model: FrozenModel) -> None:
    """The runner of the evaluation is checked against the served engine elsewhere."""
    item = scene_items(1, 3)[0]
    image = item.open()
    features = model.features(image)
    shown = Shown.whole(features, model.geometry.grid(*image.size))
    runner = QwenRunner(CHECKPOINT)
    (reply,) = runner.answer([runner.see(image, attention=False)], [item.question], steps=4)
    said = model.say(item.question, shown, 4)
    assert model.tokenizer.decode(said, skip_special_tokens=True).strip() == reply.text
    with torch.inference_mode():
        (logits,) = model.logits([model.prompt(item.question, said)], [shown])
    assert (logits[0].log_softmax(-1) - reply.logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("family", [LLAVA, QWEN2_VL, QWEN2_5_VL], ids=str)
def test_prompts_are_those_of_the_processor(checkpoint_of: CheckpointOf, family: Family) -> None:
    """Of every architecture that is trained for: ids and positions, beside one padded to another length."""
    frozen = FrozenModel(str(checkpoint_of(family, family.shallow)), "cpu")
    image, question = noise_image(720, 300, 420), "What is the time?"
    whole = Shown.whole(frozen.features(image), frozen.geometry.grid(*image.size))
    prompts = [frozen.prompt(question, [7, 9, 11]), frozen.prompt(question + " And where is it?", [5])]
    with torch.inference_mode():
        found, _ = frozen.logits(prompts, [whole, whole])
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = frozen.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = frozen.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
        asked = inputs["input_ids"].shape[1]
        ids = torch.cat([inputs["input_ids"], torch.tensor([[7, 9, 11]])], dim=1)
        kinds = {"mm_token_type_ids": (ids == frozen.image_token).int()} if family is not LLAVA else {}
        pixels = {name: part for name, part in inputs.items() if "pixel" in name or "thw" in name}
        logits = frozen.model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, **kinds).logits
    wanted = logits[0, asked - 1 : asked + 2]
    print(f"{family}: {(found - wanted).abs().max():.1e}")
    assert (found - wanted).abs().max() < 1e-4
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2


def test_memory_is_said_without_the_machine() -> None:
    ran = CliRunner().invoke(memory.app, ["--model", str(CHECKPOINT), "--batch", "4"])
    assert ran.exit_code == 0, ran.output
    assert "held for the backward pass, 4 prompts of 64 + 60 tokens" in " ".join(ran.output.split())
    more = CliRunner().invoke(memory.app, ["--model", str(CHECKPOINT), "--batch", "400"])
    assert _total(more.output) > _total(ran.output)


def _total(printed: str) -> float:
    (line,) = (line for line in printed.splitlines() if line.endswith("together"))
    return float(line.split()[0])


def test_lessons_have_the_count_of_their_rate() -> None:
    grid, view = TokenGrid(24, 24), ImageView(Box(0.0, 0.0, 1.0, 1.0))
    for seed in range(200):
        chance = random.Random(seed)
        region = [None, Region.whole(), Region.from_grid_cells(2, 3, 2, 3)][seed % 3]
        plan = plan_lesson(region, grid, view, 0.95, chance)
        assert plan.num_embeddings == retained_count(576, 0.95)
        assert plan.zone is not None


def test_the_command_writes_what_a_server_can_name(tmp_path: Path) -> None:
    picture = scene_items(1, 5)[0].open()
    picture.save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "how many circles?", "answer": "1", "boxes": []},
        {"image": "a.png", "question": "what number is on the red circle?", "answer": "2"},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["-o", str(tmp_path / "out"), "--data", str(data), "--steps", "2", "--batch", "2"]
    ran = CliRunner().invoke(app, [*arguments, "--recipe", "match"])
    assert ran.exit_code == 0, ran.output
    card = read_card(tmp_path / "out")
    assert card.base_model == "tinyvqa"
    trained = [card.training[name] for name in ("done", "recipe", "data")]
    assert trained == [2, "match", "questions.jsonl"]
    assert card.shape == ResamplerShape.suited_to(128)
    read_resampler(tmp_path / "out")
    assert "base_model: tinyvqa" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "no JSON"),
        ('{"image": "b.png", "question": "q", "answer": "a"}', "no file"),
        ('{"image": "a.png", "answer": "a"}', "question"),
        ('{"image": "a.png", "question": "q"}', "no `answer`"),
        ('{"image": "a.png", "question": "q", "answer": "a", "box": [0, 0, 1, 1]}', "did you mean 'boxes'"),
        ('{"image": "a.png", "question": "q", "answer": "a", "regions": []}', "`boxes` and `answer` are"),
        ('{"image": "a.png", "question": "q", "answer": "a", "boxes": [[0, 0, 2, 1]]}', "boxes"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, told: str) -> None:
    scene_items(1, 5)[0].open().save(tmp_path / "a.png")
    data = tmp_path / "questions.jsonl"
    data.write_text(f'{{"image": "a.png", "question": "q", "answer": "a"}}\n{line}\n')
    with pytest.raises(TrainingDataError, match=r"line 2") as refused:
        read_items(data, need_answers=True)
    assert told in str(refused.value)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]})
    )
    ran = CliRunner().invoke(app, ["-o", str(tmp_path / "out"), "--model", str(tmp_path), "--pictures", "1"])
    assert ran.exit_code == 1
    assert "not for Qwen3VLForConditionalGeneration" in " ".join(ran.output.split())
