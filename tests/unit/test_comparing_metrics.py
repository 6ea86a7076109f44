# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop compare`: how right answers are, where they stand, and intervals of what is not independent."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vllm_crop.client import CropAnswer
from vllm_crop.commands.compare import compare
from vllm_crop.comparing.asking import Asked, Reply
from vllm_crop.comparing.conditions import UNPRUNED, make_conditions
from vllm_crop.comparing.coverage import area, covered
from vllm_crop.comparing.metrics import Metric, score
from vllm_crop.comparing.questions import Question, about
from vllm_crop.comparing.reading import Data, DataError, read_data
from vllm_crop.comparing.report import make_report, notes, report_json, table_rows
from vllm_crop.comparing.run import Outcome, ServerSetup
from vllm_crop.comparing.statistics import grouped_mean
from vllm_crop.comparing.summary import summarize

PRUNED = make_conditions([0.5], None, control=False)[1]
TEN = ["red"] * 3 + ["dark red"] * 2 + ["brown"] * 5


@pytest.mark.parametrize(
    ("metric", "answer", "answers", "expected"),
    [
        ("exact", "The Stop sign.", ["halt", "stop sign"], 1.0),
        ("exact", "go", ["stop"], 0.0),
        # Of ten left out in turn: who said it leaves two that agree, everybody else three.
        ("vqa", "Red.", TEN, (3 * 2 / 3 + 7 * 1) / 10),
        ("vqa", "dark red", TEN, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("vqa", "brown", TEN, 1.0),
        ("vqa", "green", TEN, 0.0),
        ("vqa", "two", ["2"] * 10, 1.0),
        ("vqa", "none", ["0"] * 10, 1.0),
        # DocVQA's: case and white space do not matter, half a word wrong is wrong.
        ("anls", "Invoice  NO. 123", ["invoice no. 123"], 1.0),
        ("anls", "invoice no. 124", ["invoice no. 123", "x"], 1 - 1 / 15),
        ("anls", "abcd", ["abxy"], 0.0),
        ("anls", "abcde", ["abcxy"], 1 - 2 / 5),
        ("anls", "", ["a"], 0.0),
        ("anls", "", [""], 1.0),
        ("relaxed", "104.9", ["100"], 1.0),
        ("relaxed", "105.1", ["100"], 0.0),
        ("relaxed", "-95", ["-100"], 1.0),
        ("relaxed", "95", ["-100"], 0.0),
        ("relaxed", "12 %", ["0.12"], 1.0),
        ("relaxed", "$1,250.", ["1250"], 1.0),
        ("relaxed", "0", ["0"], 1.0),
        ("relaxed", "0.01", ["0"], 0.0),
        ("relaxed", "Yes.", ["yes"], 1.0),
        ("relaxed", "2019 and 2020", ["2019"], 0.0),
        ("iou", "the sign is at [0, 0, 10, 10]", ["[0, 0, 10, 20]"], 0.5),
        ("iou", "[0, 0, 10, 10]", ["[20, 20, 30, 30]", "[0,0,10,10]"], 1.0),
        ("iou", "[10, 10, 0, 0]", ["[0, 0, 10, 10]"], 0.0),
        ("iou", "upper left", ["[0, 0, 10, 10]"], 0.0),
        ("iou", "[1, 1, 1, 1]", ["[1, 1, 1, 1]"], 0.0),
    ],
)
def test_answers_are_scored_as_benchmarks_do(
    metric: Metric, answer: str, answers: list[str], expected: float
) -> None:
    assert score(answer, answers, metric) == pytest.approx(expected)


def test_the_command_offers_every_metric() -> None:
    offered = get_type_hints(compare)["metric"]
    assert get_args(offered) == get_args(Metric)


@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8))
def test_edit_distances_are_symmetric_and_those_of_a_slow_rule(one: str, other: str) -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    plain, plain_other = (" ".join(text.split())[:5].strip() for text in (one, other))
    longest = max(len(plain), len(plain_other))
    share = slow(plain, plain_other) / longest if longest else 0
    expected = 1 - share if share < 0.5 else 0
    assert score(plain, [plain_other], "anls") == pytest.approx(expected)
    assert score(plain_other, [plain], "anls") == pytest.approx(expected)


sides = st.integers(0, 10)
boxes = st.tuples(sides, sides, sides, sides).map(
    lambda b: (min(b[0], b[2]) / 10, min(b[1], b[3]) / 10, max(b[0], b[2]) / 10, max(b[1], b[3]) / 10)
)


@given(st.lists(boxes, min_size=1, max_size=3), st.lists(boxes, min_size=1, max_size=3))
def test_coverage_is_that_of_cells_counted_one_by_one(some: Any, region: Any) -> None:
    def cells(of: Any) -> Any:
        found = np.zeros((10, 10), bool)
        for x0, y0, x1, y1 in of:
            found[round(10 * y0) : round(10 * y1), round(10 * x0) : round(10 * x1)] = True
        return found

    total = cells(some).sum()
    expected = (cells(some) & cells(region)).sum() / total if total else 0
    assert covered(some, region) == pytest.approx(expected)
    assert area(region) == pytest.approx(cells(region).sum() / 100)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_groups_of_one_have_the_plain_interval(values: list[float]) -> None:
    found = grouped_mean(values, [str(place) for place in range(len(values))])
    assert found is not None
    assert found.value == pytest.approx(fmean(values))
    half = 1.959964 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.high - found.value == pytest.approx(half, abs=1e-9)
    # Saying everything twice is no more evidence.
    twice = grouped_mean([*values, *values], [str(place % len(values)) for place in range(2 * len(values))])
    assert twice is not None
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high), abs=1e-9)


def test_one_group_tells_nothing_of_others() -> None:
    assert grouped_mean([], []) is None
    assert str(grouped_mean([0.5, 1.0], ["a", "a"])) == "75.0 (one group), n 2"
    assert str(grouped_mean([0.5, 1.0], ["a", "b"])) == "75.0 (26.0 to 124.0), n 2"


# Reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return tmp_path


def write_lines(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"image": "a.png", "question": "?", **line}) for line in lines))
    return path


def test_a_line_says_how_it_is_scored(folder: Path) -> None:
    path = write_lines(
        folder,
        {"answers": ["12 %"], "metric": "relaxed", "boxes": [0, 0, 0.5, 1], "family": 3, "group": "page 1"},
        {"answer": "x"},
        {"image": "https://example.com/x.png"},
    )
    first, second, third = read_data(path, None, None, None, "anls").questions
    assert (first.metric, first.boxes, first.family) == ("relaxed", ((0, 0, 0.5, 1),), "3")
    assert (second.metric, second.boxes, second.family) == ("anls", (), None)
    assert [one.cluster for one in (first, second, third)] == [
        "page 1",
        str(folder / "a.png"),
        "https://example.com/x.png",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"answer": "a", "metric": "bleu"}, "metric: input should be 'exact', 'vqa'"),
        ({"metric": "anls"}, "metric 'anls' needs answers"),
        ({"answers": ["a", "b"], "metric": "vqa"}, "4 answers at least, mostly ten, and not 2"),
        ({"answers": ["left"], "metric": "iou"}, "needs boxes of four numbers"),
        ({"boxes": [[0, 0, 40, 30]]}, "boxes: a box must be four fractions"),
    ],
)
def test_what_cannot_be_scored_is_named(folder: Path, line: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as refused:
        read_data(write_lines(folder, {}, line), None, None, None)
    assert "1 bad:\nline 2: " in str(refused.value)
    assert said in str(refused.value)


def test_a_split_is_taken_by_itself(folder: Path) -> None:
    path = write_lines(folder, {"id": "a", "split": "dev"}, {"id": "b", "split": "test"}, {"id": "c"})
    assert [one.name for one in read_data(path, None, None, None, split="dev").questions] == ["a"]
    assert len(read_data(path, None, None, None).questions) == 3
    with pytest.raises(DataError, match="no question about a picture of split 'train'"):
        read_data(path, None, None, None, split="train")
    with pytest.raises(DataError, match="--split belongs to a file"):
        read_data(folder, "?", None, None, split="dev")


# Sums


def reply(text: str, region: Any = None, pruned: bool = True) -> Reply:
    average = 40.0 if pruned else 100.0
    facts = {"tokens": 100, "tokens_after_plc": 50, "tokens_avg": average, "localizer_ms": None}
    facts["images"] = [{"tokens": 100, "tokens_avg": average, "source": "request", "region": region}]
    return Reply(CropAnswer(text, facts, 60, 100.0, len(text), tuple(map(ord, text))), False)


def asked(
    unpruned: str, pruned: str, *answers: str, region: Any = None, whole: bool = False, **known: Any
) -> Asked:
    question = Question("q", "?", tuple(about("http://x/y", "?")), answers, **known)
    replies = {UNPRUNED.name: reply(unpruned, None, False), PRUNED.name: reply(pruned, region, not whole)}
    return Asked(question, replies)


SOME = [
    asked("100", "104", "100", metric="relaxed", family="chart", group="1"),
    asked("100", "200", "100", metric="relaxed", family="chart", group="2"),
    asked("word", "wore", "word", metric="anls", family="page", group="2"),
    asked("red", "red", "red", family="page", group="3"),
    asked("a", "b", boxes=((0.0, 0.0, 0.5, 0.5),), region=[[0.0, 0.0, 0.25, 1.0]], group="1"),
    asked("a", "a", boxes=((0.0, 0.0, 0.5, 0.5),), region=[[0.0, 0.0, 1.0, 0.5]], group="2"),
    asked("a", "a", boxes=((0.0, 0.0, 0.5, 0.5),), whole=True, group="3"),
]


def test_scores_are_summed_by_metric_and_by_family() -> None:
    base, pruned = summarize(SOME, (UNPRUNED, PRUNED))
    assert {metric: one.score.value for metric, one in pruned.scores.items()} == {
        "relaxed": 0.5,
        "anls": 0.75,
    }
    assert base.scores["relaxed"].score.value == 1
    chart, page = pruned.families["chart"], pruned.families["page"]
    assert (chart.score.n, chart.score.groups, chart.unpruned.value, chart.change.value) == (2, 2, 1, -0.5)
    assert (page.score.value, page.change.value) == (0.875, -0.125)
    assert pruned.accuracy is not None
    assert (pruned.accuracy.right.count, pruned.accuracy.right.n) == (1, 1), "what is right or wrong"
    found = pruned.found
    assert found is not None
    assert found.covered is not None
    assert found.area is not None
    assert (found.covered.value, found.area.value, found.whole) == (0.75, 0.375, 1)
    assert base.found is not None
    assert (base.found.covered, base.found.whole) == (None, 3)


def test_scores_are_shown_and_saved() -> None:
    setup = ServerSetup("http://localhost:1/v1", "M", None, None, {})
    outcome = Outcome(setup, (UNPRUNED, PRUNED), len(SOME), SOME, False)
    data = Data(tuple(one.question for one in SOME), 0, {}, len(SOME))
    report = make_report(outcome, data, {"concurrency": 1}, {"command": ["vllm-crop"]})
    rows = dict(table_rows(report.summaries))
    assert rows["score relaxed"] == ["100.0 (100.0 to 100.0), n 2", "50.0 (-48.0 to 148.0), n 2"]
    assert rows["family page"][1].startswith("87.5 (")
    assert rows["place of the answer covered"][1].endswith("n 2, 1 whole")
    assert rows["  by a region of, % of the picture"][1].startswith("37.5 (")
    assert any("of each question's metric" in note for note in notes(report))
    saved = json.loads(json.dumps(report_json(report)))["questions"]
    assert [one["replies"][PRUNED.name]["right"] for one in saved] == [1, 0, 0.75, 1, None, None, None]
    assert saved[0]["metric"] == "relaxed"
