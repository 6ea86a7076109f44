# SPDX-License-Identifier: Apache-2.0
"""The parts of lab/evaluation that need no model: questions, regions, statistics, controls, bookkeeping."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from rich.console import Console
from typer.testing import CliRunner

from lab.evaluation.__main__ import app
from lab.evaluation.asking import Answer, SceneTask, ask
from lab.evaluation.comparisons import agreements, equal_cost, margins
from lab.evaluation.conditions import LOCATE, METHODS, OFF, RATES, Condition, make_grid
from lab.evaluation.controls import near_square, resized, thumbnail_and_crop
from lab.evaluation.curves import Panel
from lab.evaluation.localizer_score import score_localizer
from lab.evaluation.markdown import write_markdown
from lab.evaluation.prefill_work import PrefillWork
from lab.evaluation.publish import PUBLISHED, tables_of, with_tables
from lab.evaluation.questions import TestScene, make_test_set
from lab.evaluation.regions import SOURCES, area, cells_of, coverage, parse_location, regions_for
from lab.evaluation.report import Report, make_report, write_report
from lab.evaluation.rivals.names import CHOOSERS
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.session import Session, make_tasks
from lab.evaluation.stats import difference, holm, mcnemar, retention, wilson
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.summary import summarize
from lab.evaluation.thresholds import THRESHOLDS, sweep
from lab.evaluation.times import ROUNDS, measure_times
from lab.tinyvqa.questions import FAMILIES, boxes_region
from lab.tinyvqa.scenes import is_test_seed
from vllm_crop.benchmarking.prefill import ModelShape, prefill_flops
from vllm_crop.families.qwen_vl import SmartResize
from vllm_crop.planning.budget import BudgetError
from vllm_crop.planning.geometry import Region

RESIZE = SmartResize(token_side=16, min_pixels=16 * 16**2, max_pixels=2**24)
PER_FAMILY = 6


@pytest.fixture(scope="module")
def scenes() -> tuple[TestScene, ...]:
    return make_test_set(PER_FAMILY)


# --- the test set


def test_every_family_is_asked_as_often_and_nothing_twice(scenes: tuple[TestScene, ...]) -> None:
    asked = [(s.scene.seed, q.family, q.text) for s in scenes for q in s.questions]
    assert len(set(asked)) == len(asked) == PER_FAMILY * len(FAMILIES)
    for family in FAMILIES:
        assert sum(one[1] == family for one in asked) == PER_FAMILY


def test_training_never_sees_a_test_scene(scenes: tuple[TestScene, ...]) -> None:
    # BatchMaker draws 2 * n.
    assert all(is_test_seed(scene.scene.seed) for scene in scenes)
    assert not is_test_seed(2 * 12345)


def test_the_test_set_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert make_test_set(2) == make_test_set(2)
    seeds = [{scene.scene.seed for scene in make_test_set(2, seed)} for seed in (0, 1)]
    assert not seeds[0] & seeds[1]


# --- regions


@pytest.mark.parametrize(
    ("said", "boxes"),
    [("2335", [(2, 3, 3, 5)]), (" 0000", [(0, 0, 0, 0)]), ("00007777", [(0, 0, 0, 0), (7, 7, 7, 7)])],
)
def test_a_location_is_read_as_boxes_of_cells(said: str, boxes: list[tuple[int, int, int, int]]) -> None:
    assert parse_location(said) == boxes_region(tuple(boxes), 8)


def test_whole_is_the_whole_image() -> None:
    assert parse_location("whole") == Region.whole()


@pytest.mark.parametrize(
    "said", ["", "233", "23355", "2385", "3325", "2533", "none", "whole 2335", "2335233"]
)
def test_what_is_no_location_is_none(said: str) -> None:
    assert parse_location(said) is None


@given(st.text())
def test_no_answer_breaks_the_parser(said: str) -> None:
    parse_location(said)


def test_what_the_localizer_is_trained_to_say_gives_the_minimal_region(scenes: tuple[TestScene, ...]) -> None:
    for scene in scenes:
        for question in scene.questions:
            region = parse_location(question.location)
            assert region == question.region(scene.scene.side)
            assert coverage(region, question, scene.scene.side) == 1


@pytest.mark.parametrize("source", [one for one in SOURCES if one != "localizer"])
def test_every_question_gets_a_region(source: str, scenes: tuple[TestScene, ...]) -> None:
    rows = regions_for(source, scenes)
    for scene, row in zip(scenes, rows, strict=True):
        side = scene.scene.side
        for question, region in zip(scene.questions, row, strict=True):
            if source in ("oracle", "shuffled") and not question.boxes:
                assert region is None  # the whole image: unpruned
            elif source == "random" and question.boxes:
                assert region is not None
                # Two boxes may fall on each other.
                assert area(region, side) <= area(question.region(side), side)
    assert rows == regions_for(source, scenes)


def test_shuffled_regions_are_those_of_other_scenes(scenes: tuple[TestScene, ...]) -> None:
    others = regions_for("shuffled", scenes)
    true = regions_for("oracle", scenes)
    local = [(a, b) for x, y in zip(others, true, strict=True) for a, b in zip(x, y, strict=True) if b]
    assert sum(other == own for other, own in local) <= len(local) / 4


def test_the_localizers_regions_are_used_and_the_rest_is_served_whole(scenes: tuple[TestScene, ...]) -> None:
    scene = scenes[0]
    first, second = scene.questions[:2]
    region = boxes_region(((1, 1, 2, 2),), 8)
    located = {(scene.scene.seed, first.text): region, (scene.scene.seed, second.text): Region.whole()}
    row = regions_for("localizer", scenes, located)[0]
    assert row == [region] + [None] * (len(scene.questions) - 1)


def test_cells_are_counted_once() -> None:
    assert len(cells_of(boxes_region(((0, 0, 1, 1), (1, 1, 2, 2)), 8), 8)) == 7
    assert area(None, 8) == 1


# --- statistics


def test_wilson_interval_by_hand() -> None:
    # 8 of 10: (0.8 + z^2/20 +- z sqrt(0.016 + z^2/400)) / (1 + z^2/10)
    found = wilson(8, 10)
    assert (found.low, found.value, found.high) == pytest.approx((0.4901625, 0.8, 0.9433178), abs=1e-6)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_contains_the_share(asked: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, asked))
    found = wilson(right, asked)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high  # all right is not certain either


def test_wilson_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_retention_is_paired() -> None:
    base = [True] * 90 + [False] * 10
    same = retention(base, base)
    assert same is not None
    assert (same.low, same.value, same.high) == (1, 1, 1)
    fewer = retention([True] * 81 + [False] * 19, base)
    assert fewer is not None
    assert fewer.value == pytest.approx(0.9)
    # Nine of the 90 lost: the spread of a share of 90.
    assert fewer.high - fewer.value == pytest.approx(1.96 * math.sqrt(0.9 * 0.1 / 90), rel=0.02)
    assert retention([True], [False]) is None


def test_difference_is_paired_and_never_certain() -> None:
    answers = [True, False] * 50
    same = difference(answers, answers)
    assert same.value == 0
    assert same.low < 0 < same.high
    assert difference([True] * 100, answers).low > 0


# --- controls


@given(st.integers(1, 600))
def test_near_square_grids_are_near_the_budget(tokens: int) -> None:
    rows, cols = near_square(tokens)
    assert abs(rows - cols) <= 2
    assert abs(rows * cols - tokens) <= math.sqrt(tokens) / 2 + 1


@pytest.mark.parametrize(("tokens", "grid"), [(192, (14, 14)), (128, (11, 12)), (64, (8, 8)), (43, (6, 7))])
def test_resized_pictures_have_the_budget(tokens: int, grid: tuple[int, int]) -> None:
    found = RESIZE.grid(*resized(Image.new("RGB", (384, 384)), tokens, RESIZE).size)
    assert sorted((found.rows, found.cols)) == sorted(grid)


def test_thumbnail_and_crop_share_the_budget(scenes: tuple[TestScene, ...]) -> None:
    picture = scenes[0].picture()
    for tokens in (192, 128, 64, 43):
        for boxes in (((0, 0, 0, 0),), ((7, 7, 7, 7),), ((0, 0, 7, 7),), ((0, 0, 1, 0), (6, 7, 7, 7))):
            images = thumbnail_and_crop(picture, boxes_region(boxes, 8), tokens, RESIZE)
            counts = [RESIZE.grid(*image.size).num_tokens for image in images]
            assert abs(sum(counts) - tokens) <= 8, (tokens, boxes, counts)
            assert min(counts) >= RESIZE.min_tokens


def test_a_small_crop_keeps_its_pixels() -> None:
    picture = Image.effect_noise((384, 384), 50).convert("RGB")
    _, crop = thumbnail_and_crop(picture, boxes_region(((3, 2, 3, 2),), 8), 192, RESIZE)
    assert crop.size == (64, 64)  # 48 pixels widened to the least
    assert crop.tobytes() == picture.crop((144, 96, 208, 160)).tobytes()


# --- the grid, and how conditions ask


def test_the_unpruned_model_comes_first_and_sources_that_cannot_help_run_once() -> None:
    grid = make_grid(METHODS, RATES, SOURCES)
    assert grid[0] == OFF
    assert len(set(grid)) == len(grid)
    assert len({condition.slug for condition in grid}) == len(grid)
    assert {condition.region for condition in grid if condition.method == "ilp"} == {"localizer", "oracle"}
    assert {condition.region for condition in grid if condition.method == "plc"} == set(SOURCES)
    assert {condition.pruning_rate for condition in grid if condition.method == "fastv"} == set(RATES)


def test_regions_of_the_server_are_no_clients_business(scenes: tuple[TestScene, ...]) -> None:
    grid = make_grid(("plc", "ilp", "two-images"), [0.889], ("oracle", "server"))
    found = [condition for condition in grid if condition.region == "server"]
    assert [condition.method for condition in found] == ["plc", "ilp"]
    for condition in found:
        (task, *_) = make_tasks(condition, scenes, None)
        assert {str(one.crop) for one in ask(condition, task, RESIZE)} == {
            str({"pruning_rate": 0.889, "method": condition.method})
        }


def test_every_rival_has_a_name_and_a_method() -> None:
    assert list(RIVALS) == list(CHOOSERS)


def test_cells_ask_what_they_are_to_measure(scenes: tuple[TestScene, ...]) -> None:
    scene = scenes[0]
    regions = tuple(regions_for("oracle", scenes)[0])
    task = SceneTask(scene, regions)
    tokens = {
        condition: [
            sum(RESIZE.grid(*image.size).num_tokens for image in one.images)
            for one in ask(condition, task, RESIZE)
        ]
        for condition in (OFF, Condition("no-image"), Condition("resize", None, 0.889), Condition(LOCATE))
    }
    assert [set(counts) for counts in tokens.values()] == [{576}, {0}, {64}, {64}]
    assert all(one.text.startswith("where:") for one in ask(Condition(LOCATE), task, RESIZE))
    asked = ask(Condition("plc", "oracle", 0.889), task, RESIZE)
    for one, region in zip(asked, regions, strict=True):
        sent = [None if region is None else region.as_lists()]
        assert one.crop == {"regions": sent, "pruning_rate": 0.889, "method": "plc"}


# --- running, resuming, reporting


class StandIn:
    """Answers right as often as told; counts how often it was asked."""

    name = "stand-in"

    def __init__(self, wrong: dict[str, int]) -> None:
        self.wrong, self.calls = wrong, 0

    def answer(self, condition: Condition, tasks: list[SceneTask]) -> list[list[Answer]]:
        self.calls += 1
        if condition.method == "ilp":
            raise BudgetError("too few layers")
        rows = []
        for task in tasks:
            row = []
            for index, question in enumerate(task.scene.questions):
                said = question.location if condition.method == LOCATE else question.answer
                wrong = index < self.wrong.get(condition.method, 0)
                row.append(Answer("?" if wrong else said, 64.0, 76.0, 76))
            rows.append(row)
        return rows

    def first_token_ms(self, condition: Condition, task: SceneTask) -> float:
        assert condition.region in (None, "oracle")
        return 100.0 + self.calls if condition == OFF else 25.0


def run(
    folder: Path, scenes: tuple[TestScene, ...], answerer: StandIn, settings: object = 1
) -> list[ConditionResult]:
    grid = make_grid(["plc", "ilp", "fastv"], [0.889], ["localizer"])
    store = Store(folder, {"settings": settings})
    session = Session(scenes, lambda _: answerer, lambda _: "stand-in", store, Console(quiet=True))
    return session.run(grid)


def test_finished_cells_are_not_run_again(tmp_path: Path, scenes: tuple[TestScene, ...]) -> None:
    first, second, third = StandIn({}), StandIn({}), StandIn({})
    results = run(tmp_path, scenes, first)
    assert [result.condition.method for result in results] == [LOCATE, "off", "plc", "ilp", "fastv"]
    assert run(tmp_path, scenes, second) == results
    assert (first.calls, second.calls) == (5, 0)
    run(tmp_path, scenes, third, settings=2)  # never mixes what was set otherwise
    assert third.calls == 5


def test_questions_without_a_region_are_not_asked_twice(
    tmp_path: Path, scenes: tuple[TestScene, ...]
) -> None:
    """They are the unpruned model's, and so are their answers."""
    answerer = StandIn({"off": 99})
    results = {result.condition.method: result for result in run(tmp_path, scenes, answerer)}
    questions = [question for scene in scenes for question in scene.questions]
    for question, answer in zip(questions, results["plc"].answers, strict=True):
        assert answer.text == (question.answer if question.boxes else "?")


def test_a_stopped_run_goes_on_with_the_first_unfinished_cell(
    tmp_path: Path, scenes: tuple[TestScene, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, scenes, StandIn({}))
    assert not list(tmp_path.glob("conditions/*"))
    results = run(tmp_path, scenes, StandIn({}))
    assert len(list(tmp_path.glob("conditions/*.json"))) == len(results)


def test_the_table_counts_right_answers_and_margins(tmp_path: Path, scenes: tuple[TestScene, ...]) -> None:
    results = run(tmp_path, scenes, StandIn({"fastv": 2}))
    rows = {row.condition.method: row for row in summarize(scenes, results)}
    assert rows["off"].groups["all"].accuracy.value == 1
    assert rows["plc"].groups["local"].asked == 3 * PER_FAMILY
    assert rows["ilp"].impossible == "too few layers"
    lost = 2 * len(scenes) / (5 * PER_FAMILY)
    assert rows["fastv"].groups["all"].accuracy.value == pytest.approx(1 - lost)
    assert rows["fastv"].groups["all"].visual_tokens == 64
    (margin,) = margins(scenes, results)
    assert (margin.method, margin.against) == ("CROP plc, localizer", "FastV")
    assert margin.gained.value == pytest.approx(1 - rows["fastv"].groups["local"].accuracy.value)


def test_times_are_measured_in_turn_and_once(tmp_path: Path, scenes: tuple[TestScene, ...]) -> None:
    """Each beside the unpruned model of its round; what only transformers can do has none."""
    results = run(tmp_path, scenes, StandIn({}))
    results[-1] = replace(results[-1], engine="transformers")
    store, turns = Store(tmp_path, {"settings": 1}), list[str]()

    class InTurn(StandIn):
        def first_token_ms(self, condition: Condition, task: SceneTask) -> float:
            turns.append(condition.method)
            self.calls += condition == OFF
            return super().first_token_ms(condition, task)

    in_turn = InTurn({})
    times = measure_times(results, lambda _: in_turn, store, Console(quiet=True))
    assert turns == [LOCATE, "off", "plc"] * ROUNDS
    rows = {row.condition.method: row for row in summarize(scenes, results, times)}
    assert (rows["plc"].ttft_ms, rows["off"].ttft_share) == (25.0, 1.0)
    assert rows["plc"].ttft_share == pytest.approx(25 / median(range(102, 101 + ROUNDS)), rel=0.01)
    assert (rows["fastv"].ttft_ms, rows["ilp"].ttft_ms) == (None, None)
    score = score_localizer(scenes, results, times)
    assert score is not None
    assert score.ms == 25.0
    again = measure_times(results, lambda _: pytest.fail("known"), store, Console(quiet=True))
    assert again == times
    measure_times(results, lambda _: in_turn, Store(tmp_path, {"settings": 2}), Console(quiet=True))
    assert len(turns) == 2 * 3 * ROUNDS, "never those of other settings"


def test_pooling_evenly_is_among_those_that_crop_is_compared_with(
    tmp_path: Path, scenes: tuple[TestScene, ...]
) -> None:
    grid = make_grid(["plc", "random"], [0.889], ["localizer", "oracle", "whole"])
    session = Session(
        scenes, lambda _: StandIn({}), lambda _: "stand-in", Store(tmp_path, {}), Console(quiet=True)
    )
    found = margins(scenes, session.run(grid))
    assert [one.against for one in found] == ["CROP plc, whole", "random tokens (control)"]


def test_at_equal_cost_another_method_may_have_the_tokens_of_both_passes(
    tmp_path: Path, scenes: tuple[TestScene, ...]
) -> None:
    class Costing(StandIn):
        """Rivals have the tokens of their rates, and are wrong once a scene at few of them."""

        def answer(self, condition: Condition, tasks: list[SceneTask]) -> list[list[Answer]]:
            tokens = 64.0 if condition.pruning_rate is None else round(576 * (1 - condition.pruning_rate))
            self.wrong = {condition.method: 1} if condition.method == "fastv" and tokens < 100 else {}
            return [
                [replace(one, visual_tokens=tokens) for one in row]
                for row in super().answer(condition, tasks)
            ]

    costing = Costing({})
    grid = make_grid(["plc", "fastv"], [0.667, 0.778, 0.889, 0.926], ["localizer", "whole"])
    session = Session(
        scenes, lambda _: costing, lambda _: "stand-in", Store(tmp_path, {}), Console(quiet=True)
    )
    results = session.run(grid)
    found = {(one.rate, one.against): one for one in equal_cost(scenes, results)}
    assert len(found) == 4 * 2
    # 64 of its own and 64 of the localizer's: what the others have at 0.778.
    here = found[0.889, "FastV"]
    assert (here.tokens, here.against_rate, here.against_tokens) == (128, 0.778, 128)
    assert (here.gained.value, here.chance) == (0, 1)
    lower = found[0.926, "FastV"]
    assert (lower.tokens, lower.against_rate) == (107, 0.889)
    assert lower.gained.value > 0
    assert found[0.926, "CROP plc, whole"].chance == 1
    # Every scene has one that only CROP answers right.
    alone = mcnemar([True] * len(scenes), [False] * len(scenes))
    assert lower.chance == pytest.approx(min(1, 8 * alone))


def test_chances_are_those_of_textbooks() -> None:
    # 10 discordant pairs, 2 to 8: 2 * (1 + 10 + 45) / 1024.
    assert mcnemar([True] * 8 + [False] * 2 + [True] * 5, [False] * 8 + [True] * 2 + [True] * 5) == 112 / 1024
    assert mcnemar([True, False], [True, False]) == mcnemar([True, False], [False, True]) == 1
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("source", ["localizer", "server", "oracle"])
def test_finding_a_region_costs_tokens_and_steps(
    source: str, tmp_path: Path, scenes: tuple[TestScene, ...]
) -> None:
    """Of every question: also of those that it says need the whole image."""

    class Counting(StandIn):
        def answer(self, condition: Condition, tasks: list[SceneTask]) -> list[list[Answer]]:
            steps = iter(range(10_000))
            rows = super().answer(condition, tasks)
            return [[replace(one, steps=next(steps) % 2 + 5) for one in row] for row in rows]

    grid = make_grid(["plc"], [0.889], [source])
    store, counting = Store(tmp_path, {}), Counting({})
    session = Session(scenes, lambda _: counting, lambda _: "stand-in", store, Console(quiet=True))
    results = session.run(grid)
    row = next(one for one in summarize(scenes, results) if one.condition.method == "plc")
    for group in row.groups.values():
        assert group.localizer_tokens == (0 if source == "oracle" else 64)
        assert group.total_tokens == group.visual_tokens + group.localizer_tokens
        assert group.localizer_steps == 0 if source == "oracle" else 5 < group.localizer_steps < 6
    within, total, kept, unknown_time = (
        Panel("", "local", lambda _: True, cost).costs(row, 5.0) for cost in ("answer", "total", "kv", "ttft")
    )
    assert within is not None
    assert total == within + (0 if source == "oracle" else 64)
    assert (kept, unknown_time) == (row.groups["local"].kv_tokens, None)
    timed = Panel("", "local", lambda _: True, "ttft").costs(replace(row, ttft_ms=20.0), 5.0)
    assert timed == (20 if source == "oracle" else 25)
    work = PrefillWork(ModelShape(12, 128, 384), (1,))
    worked = next(one for one in summarize(scenes, results, None, work) if one.condition.method == "plc")
    for name, group in worked.groups.items():
        share = group.prefill_work
        assert share is not None
        assert share == Panel("", name, lambda _: True, "work").costs(worked, 5.0)
        # The stand-in says as many tokens for the unpruned image: what is more is the other pass.
        assert share == 1 if source == "oracle" else 2 < share < 2.5
    described = score_localizer(scenes, results)
    assert (described is None) == (source == "oracle")
    if described:
        assert described.steps is not None
        assert 5 < described.steps < 6
    unknown = [one for one in results if one.condition.method != LOCATE]
    without = next(one for one in summarize(scenes, unknown) if one.condition.method == "plc")
    assert without.groups["all"].localizer_tokens == (0 if source == "oracle" else None)
    rows = summarize(scenes, unknown, None, work)
    without = next(one for one in rows if one.condition.method == "plc")
    assert (without.groups["all"].prefill_work is None) == (source != "oracle")


def test_work_is_counted_layer_by_layer_and_word_by_word() -> None:
    shape = ModelShape(12, 128, 384)
    work = PrefillWork(shape, (1,))
    full = Answer("7", 576.0, 588.0, 588)
    pruned = Answer("7", 64.0, 76.0, 588)
    plain = work.of_answer(Condition("plc", "oracle", 0.889), pruned, full)
    assert plain == prefill_flops(shape, [76.0] * 12)
    # The same average, but a full layer at first: attention among all of its tokens is dearer.
    staged = work.of_answer(Condition("ilp", "oracle", 0.889), pruned, full)
    assert staged == pytest.approx(prefill_flops(shape, [588.0, *[12 + (64 * 12 - 576) / 11] * 11]), rel=1e-2)
    assert staged > plain
    back = work.layer_counts(Condition("lvlm-csp", None, 0.889, "grid of 16, all at 3"), 64.0, 576)
    assert back[:5] == pytest.approx([16, 16, 16, 576, 18])
    whole = work.of_answer(Condition("ilp", "localizer", 0.889), full, full)
    assert whole == prefill_flops(shape, [588.0] * 12)
    assert work.layer_counts(Condition("resize", None, 0.889), 66.0, 576) == [66.0] * 12
    located = Answer("all", 64.0, 80.0, 80, steps=5)
    prompt, word = prefill_flops(shape, [80.0] * 12), prefill_flops(shape, [1.0] * 12) + 2 * 80 * 128 * 12
    assert work.of_localizing(located) == prompt + 4 * word
    assert work.of_localizing(replace(located, steps=1)) == prompt


def test_the_localizer_is_scored_by_cells(tmp_path: Path, scenes: tuple[TestScene, ...]) -> None:
    score = score_localizer(scenes, run(tmp_path, scenes, StandIn({})))
    assert score is not None
    assert (score.covered.value, score.coverage, score.whole.value, score.unreadable) == (1, 1, 1, 0)
    assert 1 / 64 <= score.area <= 4 / 64
    broken = score_localizer(scenes, run(tmp_path / "broken", scenes, StandIn({LOCATE: 99})))
    assert broken is not None
    # Served whole: covered, but not cheap, and counted.
    assert (broken.coverage, broken.area, broken.unreadable) == (1, 1, broken.asked)


def test_the_page_needs_nothing_else(tmp_path: Path, scenes: tuple[TestScene, ...]) -> None:
    pytest.importorskip("matplotlib")
    results = run(tmp_path, scenes, StandIn({"fastv": 1}))
    other = replace(results[1], engine="transformers", answers=tuple(reversed(results[1].answers)))
    store = Store(tmp_path, {"settings": 1})
    store.save(other)
    agreed = agreements(results, store)
    assert [(one.condition, one.engine, one.asked) for one in agreed] == [(OFF, "stand-in", 5 * PER_FAMILY)]
    assert agreed[0].same < agreed[0].asked
    origin = {
        "git_revision": "<abc>",
        "command": ["python", "-m", "lab.evaluation", "-o", "a b"],
        "seconds": 90.0,
    }
    origin["revisions_of_conditions"] = ["0123456789abcdef", "unknown"]
    report = make_report(scenes, results, agreed, origin, ("Read this first.",))
    write_report(tmp_path, report)
    page = (tmp_path / "index.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
    assert "&lt;abc&gt;" in page
    assert "too few layers" in page
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["condition"]["method"] for row in found["rows"]] == ["off", "plc", "ilp", "fastv"]
    assert found["provenance"] == origin
    assert "<p>Read this first.</p>" in page
    table = (tmp_path / "README.md").read_text()
    assert (
        "`python -m lab.evaluation -o 'a b'`, conditions measured at 0123456789ab, unknown, in 2 minutes"
        in table
    )
    table, _, compared = table.partition("\n## ")
    assert "| CROP plc, localizer | 0.889 | 128 | FastV | 0.889 | 64 |" in compared
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(results) - 1  # the localizer's own condition is no row
    assert len({line.count("|") for line in lines}) == 1
    assert "![Accuracy against visual tokens](curves.png)" in table
    assert "* Read this first." in table
    by_name = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert "| 128 / 128 |" in by_name["CROP plc, localizer"]  # 64 more than without the localizer
    assert "|  |  |" in by_name["FastV"]


def test_readmes_tables_are_made_of_the_published_numbers() -> None:
    readme = (PUBLISHED.parents[2] / "README.md").read_text(encoding="utf-8")
    tables = tables_of(PUBLISHED)
    assert with_tables(readme, tables) == readme
    # It would notice: one digit, or a table that has no place.
    assert with_tables(readme.replace("| 576 | 1.00x | 99.3", "| 576 | 1.00x | 99.4"), tables) == readme
    with pytest.raises(ValueError, match="no place for the table 'same tokens'"):
        with_tables(readme.replace("<!-- end of same tokens -->", ""), tables)


def test_readmes_tables_leave_nobody_out() -> None:
    """Every rival that can meet the rate is in both; what is untrained is in no comparison at equal cost."""
    report = TypeAdapter(Report).validate_json((PUBLISHED / "results.json").read_text())
    tables = tables_of(PUBLISHED)
    for row in report.rows:
        if row.condition.chooses_tokens and not row.impossible and row.condition.pruning_rate == 0.889:
            for table in tables.values():
                assert f"| {row.condition.row}" in table, row.condition.row
    assert "resize" in tables["same tokens"]
    assert "resize" not in tables["equal cost"]


def test_the_published_page_is_made_of_the_published_numbers(tmp_path: Path) -> None:
    report = TypeAdapter(Report).validate_json((PUBLISHED / "results.json").read_text())
    write_markdown(tmp_path / "README.md", report)
    assert (PUBLISHED / "README.md").read_text() == (tmp_path / "README.md").read_text()
    for row in report.rows:
        assert row.condition.method in METHODS, "a row that no command makes"


def test_the_review_works_its_numbers_out_of_the_published_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PUBLISHED.parents[2])
    text = (PUBLISHED.parent / "REVIEW.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code
    exec(code.group(1), {})
    assert capsys.readouterr().out == text.split("It prints\n\n```\n")[1].split("```")[0]


def test_results_survive_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path, {"n": 1})
    result = ConditionResult(
        Condition("plc", "oracle", 0.5), "vllm", (Answer("7", 1.5, 2.5, 3),), 1.0, None, "r"
    )
    store.save(result)
    assert store.load(result.condition, "vllm") == result
    assert store.load(result.condition, "transformers") is None
    assert replace(store, settings={"n": 2}).load(result.condition, "vllm") is None


def test_cells_of_other_configurations_are_never_mixed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, {"n": 1})
    for name in RIVALS["fastv"].configurations:
        store.save(ConditionResult(Condition("fastv", None, 0.5, name), "t", (Answer(name, 1.5, 2.5, 3),)))
    for name in RIVALS["fastv"].configurations:
        found = store.load(Condition("fastv", None, 0.5, name), "t")
        assert found is not None
        assert found.answers[0].text == name
    assert store.load(Condition("fastv", None, 0.5), "t") is None
    # The same name may come to mean something else.
    changed = replace(RIVALS["fastv"], configurations={"K=2": {"layer": 5}, "K=1": {"layer": 1}})
    monkeypatch.setitem(RIVALS, "fastv", changed)
    assert store.load(Condition("fastv", None, 0.5, "K=2"), "t") is None
    assert store.load(Condition("fastv", None, 0.5, "K=1"), "t") is not None


# --- the command


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "plc,magic"], "magic"),
        (["--rates", "1.0"], "fractions in [0, 1)"),
        (["--rates", "high"], "fractions in [0, 1)"),
        (["--regions", "nowhere"], "nowhere"),
        (["--eviction-layers", "x"], "layer numbers"),
        (["--split", "train"], "train"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], complaint: str) -> None:
    pytest.importorskip("matplotlib")
    finished = CliRunner().invoke(app, ["--engine", "transformers", *arguments], env={"COLUMNS": "300"})
    assert finished.exit_code == 2
    assert complaint in finished.output


def test_a_missing_checkpoint_is_said_with_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    finished = CliRunner().invoke(app, ["--engine", "transformers", "--model", str(tmp_path)])
    assert finished.exit_code == 1
    assert "lab.tinyvqa.training" in finished.output


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    finished = CliRunner().invoke(app, ["--engine", "transformers", "--model", str(tmp_path)])
    assert finished.exit_code == 1
    assert "Qwen2_5_VLForConditionalGeneration" in finished.output


def test_doubtful_regions_are_replaced_by_the_unpruned_answer() -> None:
    scenes = make_test_set(2)
    truth = [question.answer for scene in scenes for question in scene.questions]
    sure = [0.1, 0.6, 0.95, 0.3, 0.8] * (len(truth) // 5)
    whole = ConditionResult(OFF, "vllm", tuple(Answer(text, 576, 590, 590) for text in truth))
    pruned = ConditionResult(
        Condition("plc", "localizer", 0.889), "vllm", tuple(Answer("no", 64, 78, 78) for _ in truth)
    )
    located = ConditionResult(Condition(LOCATE), "vllm", tuple(Answer("whole", 64, 78, 78, p) for p in sure))
    rows = sweep(scenes, [whole, located, pruned])
    assert [row.whole_below for row in rows] == list(THRESHOLDS)
    for row in rows:
        used = sum(p >= row.whole_below for p in sure) / len(sure)
        assert row.used == used
        assert row.groups["all"].accuracy.value == pytest.approx(1 - used)
        assert row.groups["all"].visual_tokens == pytest.approx(64 * used + 576 * (1 - used))
    unknown = replace(located, answers=tuple(replace(one, confidence=None) for one in located.answers))
    assert sweep(scenes, [whole, unknown, pruned]) == []
