# SPDX-License-Identifier: Apache-2.0
"""How configurations of rivals are chosen, on which questions, and what is published of the answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lab.evaluation import options, transformers_answers, tuning
from lab.evaluation.asking import Answer, SceneTask
from lab.evaluation.conditions import LOCATE, OFF, Condition, make_grid
from lab.evaluation.notes import notes_of
from lab.evaluation.options import Options
from lab.evaluation.published_answers import read_answers, write_answers
from lab.evaluation.questions import SPLITS, make_split, make_test_set, only_local
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.run import _check_tuning, _tuning
from lab.evaluation.stats import difference, wilson
from lab.evaluation.store import ConditionResult
from lab.evaluation.summary import summarize
from lab.evaluation.times import TIMES_SEED
from lab.evaluation.tuned import Tried, Tuned, Tuning, choose, read_tuning, write_tuning
from lab.tinyvqa.questions import LOCAL
from vllm_crop.errors import CropError
from vllm_crop.planning.budget import BudgetError

ORIGIN = {"asked": 300, "date": "today", "git_revision": "r", "settings": {"weights": "w", "split": "dev"}}


def tried(name: str, right: int | None) -> Tried:
    return Tried(name, impossible="too late") if right is None else Tried(name, wilson(right, 100), 100)


# --- splits


def test_splits_share_no_scene_with_each_other_nor_with_what_is_timed() -> None:
    scenes = {split: {one.scene.seed for one in make_split(split, 4)} for split in SPLITS}
    for one, seeds in scenes.items():
        assert all(not seeds & others for other, others in scenes.items() if other != one)
    # The longest name of a condition there is.
    assert TIMES_SEED not in SPLITS.values()


def test_only_local_questions_are_tuned_on() -> None:
    scenes = make_test_set(3)
    local = only_local(scenes)
    kept = [question for scene in local for question in scene.questions]
    assert [question for question in kept if question.family not in LOCAL] == []
    assert len(kept) == 9


# --- choosing


def test_the_best_configuration_is_chosen_and_the_published_one_of_equals() -> None:
    assert choose([tried("published", 80), tried("other", 81)]) == "other"
    assert choose([tried("published", 81), tried("other", 81)]) == "published"
    assert choose([tried("published", None), tried("one", 5), tried("two", 5)]) == "one"
    assert choose([tried("published", None)]) is None


def test_a_tuning_survives_the_disk(tmp_path: Path) -> None:
    found = Tuning(ORIGIN, (Tuned("fastv", 0.889, "K=1", (tried("K=2", None), tried("K=1", 50))),))
    write_tuning(tmp_path / "tuning.json", found)
    assert read_tuning(tmp_path / "tuning.json") == found
    assert found.configuration("fastv", 0.889) == "K=1"
    assert found.configuration("fastv", 0.778) is None
    assert found.number_tried("fastv", 0.889) == 1  # what cannot meet the rate was not asked


def test_other_methods_stay_if_the_same_was_asked() -> None:
    old = Tuning({"settings": {"n": 1}, "date": "old"}, (Tuned("a", 0.5, "x", ()), Tuned("b", 0.5, "x", ())))
    new = Tuning({"settings": {"n": 1}, "date": "new"}, (Tuned("b", 0.5, "y", ()), Tuned("c", 0.5, "x", ())))
    both = new.beside(old)
    assert [(one.method, one.chosen) for one in both.methods] == [("a", "x"), ("b", "y"), ("c", "x")]
    assert both.earlier == (old.provenance,)
    assert new.beside(None) == new
    rates = Tuning(old.provenance, (Tuned("c", 0.9, "z", ()), Tuned("c", 0.5, "z", ())))
    assert [(one.pruning_rate, one.chosen) for one in new.beside(rates).methods] == [
        *((0.9, "z"), (0.5, "y"), (0.5, "x"))
    ]
    other = Tuning({"settings": {"n": 2}}, new.methods)
    assert other.beside(old) == other
    assert new.beside(Tuning(old.provenance, (Tuned("c", 0.5, "z", ()),))) == new  # nothing of it is left


def test_what_is_chosen_is_what_runs() -> None:
    found = Tuning(ORIGIN, (Tuned("fastv", 0.889, "K=1", (tried("K=1", 50),)),))
    grid = make_grid(["fastv", "resize", "plc"], [0.889, 0.778], ["oracle"], found.configuration)
    assert [one.configuration for one in grid if one.method == "fastv"] == ["K=1", None]
    assert all(one.configuration is None for one in grid if one.method != "fastv")


def test_a_result_says_how_rivals_were_tuned(tmp_path: Path) -> None:
    found = Tuning(ORIGIN, (Tuned("fastv", 0.889, "K=1", (tried("K=2", 40), tried("K=1", 50))),))
    assert any(
        "most of 300 local questions of the dev split, of up to 2" in note for note in notes_of("test", found)
    )
    assert any("untuned" in note for note in notes_of("test", None))
    assert notes_of("seen", found) != notes_of("test", found)
    grid = tuple(make_grid(["fastv"], [0.889], []))
    options = Options(tmp_path, 2, grid, "transformers", None, (1,), "test", tmp_path, found)
    assert _tuning(options) == {**ORIGIN, "tried": {"fastv 0.889": 2}}
    _check_tuning(options, {"weights": "w"})
    with pytest.raises(CropError, match="tuned for another checkpoint"):
        _check_tuning(options, {"weights": "x"})
    chosen = tuple(make_grid(["fastv"], [0.889], [], lambda method, rate: "K=99"))
    with pytest.raises(CropError, match="'K=99' for fastv, which has none of that name any more"):
        _check_tuning(replace(options, grid=chosen), {"weights": "w"})


# --- the command


class StandIn:
    """Answers right with one configuration only; predicts less well the earlier tokens are withdrawn."""

    name = "transformers"
    num_layers = 4
    calls = 0

    def __init__(self, *_: Any) -> None:
        self.runner = self

    def answer(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(arguments[0], Condition):
            return self._answer_condition(*arguments)
        _, texts, *pruning = arguments
        layer = next(iter(pruning[0].stages)) if pruning else self.num_layers
        gap = 10.0 ** (1 - layer) if pruning else 0.0
        logprobs = torch.tensor([0.5 + gap / 4, 0.5 - gap / 4]).log()
        return [type("Reply", (), {"logprobs": logprobs})() for _ in texts]

    def _answer_condition(self, condition: Condition, tasks: list[SceneTask]) -> list[list[Answer]]:
        type(self).calls += 1
        if condition.method != "off":
            RIVALS[condition.method](576, 12, condition.pruning_rate or 0.0, condition.configuration)
        right = condition.configuration in ("K=1", None)
        return [
            [Answer(question.answer if right else "?", 64.0, 70.0, 70) for question in task.scene.questions]
            for task in tasks
        ]

    def see(self, scene: Any) -> Any:
        return scene


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(transformers_answers, "TransformersAnswers", StandIn)
    monkeypatch.setattr(options, "weights_hash", lambda model: "w")
    StandIn.calls = 0
    folder = ["--folder", str(tmp_path / "cells"), "--out", str(tmp_path / "tuning.json")]
    return ["--n", "2", "--methods", "fastv,vtw", "--rates", "0.667,0.889", *folder]


def test_the_tuning_writes_all_it_tried_and_goes_on(command: list[str], tmp_path: Path) -> None:
    assert CliRunner().invoke(tuning.app, command).exit_code == 0
    found = read_tuning(tmp_path / "tuning.json")
    assert [(one.method, one.pruning_rate) for one in found.methods] == [
        ("fastv", 0.667),
        ("fastv", 0.889),
        ("vtw", 0.667),
        ("vtw", 0.889),
    ]
    fastv = found.methods[0]
    assert [one.configuration for one in fastv.tried] == list(RIVALS["fastv"].configurations)
    assert fastv.chosen == "K=1"
    assert [one.accuracy and one.accuracy.value for one in fastv.tried] == [0.0, 1.0, 0.0, None, None]
    assert [one.asked for one in fastv.tried] == [6, 6, 6, 0, 0]
    assert "takes at least" in str(fastv.tried[-1].impossible)
    assert found.provenance["settings"]["seed"] == SPLITS["dev"]
    calls = StandIn.calls
    assert calls > 0
    assert CliRunner().invoke(tuning.app, command).exit_code == 0
    assert StandIn.calls == calls  # nothing was asked again


def test_vtw_goes_by_its_own_rule(command: list[str], tmp_path: Path) -> None:
    CliRunner().invoke(tuning.app, command)
    found = read_tuning(tmp_path / "tuning.json")
    for rate in (0.667, 0.889):
        (one,) = (each for each in found.methods if (each.method, each.pruning_rate) == ("vtw", rate))
        assert one.chosen == "K=2"  # 0.14 nats at 1, 0.001 at 2
        assert [each.configuration for each in one.tried] == ["K=1", "K=2", "K=3"]
        measures = [each.divergence or 0.0 for each in one.tried]
        assert sorted(measures, reverse=True) == measures
    with pytest.raises(BudgetError, match=r"at most 0\.417"):
        RIVALS["vtw"](576, 12, 0.667, "K=7")


def test_nothing_is_chosen_on_the_test_split(command: list[str]) -> None:
    finished = CliRunner().invoke(tuning.app, [*command, "--split", "test"], env={"COLUMNS": "300"})
    assert finished.exit_code == 2
    assert "nothing is chosen on the test split" in finished.output
    assert StandIn.calls == 0


# --- what is published


def test_intervals_can_be_worked_out_again_from_what_is_published(tmp_path: Path) -> None:
    scenes = make_test_set(4)
    truth = [question.answer for scene in scenes for question in scene.questions]
    said = [one if index % 3 else "?" for index, one in enumerate(truth)]

    def result(condition: Condition, texts: list[str], tokens: list[float]) -> ConditionResult:
        pairs = zip(texts, tokens, strict=True)
        return ConditionResult(
            condition, "vllm", tuple(Answer(text, one, one + 9, 99) for text, one in pairs)
        )

    flat, mixed = [64.0] * len(truth), [64.0 if index % 2 else 576.0 for index in range(len(truth))]
    results = [
        result(Condition(LOCATE), ["whole"] * len(truth), flat),
        result(OFF, truth, [576.0] * len(truth)),
        result(Condition("plc", "localizer", 0.889), said, mixed),
        ConditionResult(Condition("ilp", "oracle", 0.926), "vllm", impossible="too few"),
    ]
    write_answers(tmp_path / "answers.jsonl.gz", scenes, results)
    questions, cells = read_answers(tmp_path / "answers.jsonl.gz")
    assert [one.cell for one in cells] == ["locate", "off", "plc-localizer-0.889"]
    assert [one.answer for one in questions] == truth
    unpruned, ours = cells[1:]
    assert list(ours.texts) == said
    assert list(ours.visual_tokens) == mixed
    assert (set(ours.localizer_tokens), set(unpruned.localizer_tokens)) == ({64.0}, {0.0})
    local = [one.family in LOCAL for one in questions]
    right = [one for one, chosen in zip(ours.correct, local, strict=True) if chosen]
    row = next(one for one in summarize(scenes, results) if one.condition.method == "plc")
    assert wilson(sum(right), len(right)) == row.groups["local"].accuracy
    assert difference(ours.correct, unpruned.correct).value == -sum(one == "?" for one in said) / len(said)
    again = tmp_path / "again.gz"
    write_answers(again, scenes, results)
    assert again.read_bytes() == (tmp_path / "answers.jsonl.gz").read_bytes()


def test_two_thousand_answers_take_little_room(tmp_path: Path) -> None:
    scenes = make_test_set(100)
    truth = [question.answer for scene in scenes for question in scene.questions]
    results = [
        ConditionResult(
            Condition("fastv", None, index / 100),
            "vllm",
            tuple(Answer(truth[(place * index) % len(truth)], 64.0, 70.0, 70) for place in range(len(truth))),
        )
        for index in range(1, 21)
    ]
    write_answers(tmp_path / "answers.gz", scenes, results)
    assert (tmp_path / "answers.gz").stat().st_size < 60_000  # 10,000 answers
