# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop compare` without a server: what is read and refused, what counts as the same, sums, the page."""

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from vllm_crop.client import CropAnswer, data_url, question_about
from vllm_crop.commands.app import app
from vllm_crop.comparing.answers import is_right, is_same, normalise
from vllm_crop.comparing.asking import Asked, Failure, Reply, SeenPictures
from vllm_crop.comparing.conditions import AGAIN, UNPRUNED, asking_order, make_conditions
from vllm_crop.comparing.page import render_page
from vllm_crop.comparing.questions import Question, about, image_urls, last_text
from vllm_crop.comparing.reading import Data, DataError, read_data
from vllm_crop.comparing.report import Report, make_report, report_json, table_rows, write_json, write_whole
from vllm_crop.comparing.run import Outcome, ServerSetup
from vllm_crop.comparing.scoring import Score, answer_tokens
from vllm_crop.comparing.statistics import percentile, share, spread
from vllm_crop.comparing.summary import differs, summarize
from vllm_crop.drawing.looks import REGION_COLOUR
from vllm_crop.drawing.preview import draw_region
from vllm_crop.planning.geometry import Box, Region

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
PRUNED = make_conditions([0.5], None, control=False)[1]
numbers = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The red square.", "red  square"),
        ("Yes!", "yes"),
        ("A cat", "cat"),
        ("STRASSE", "straße"),
        ("\uff14\uff12", "42"),
        ("New York, NY", "new york ny"),
        ("$5", "$5."),
    ],
)
def test_what_does_not_matter_is_left_out(one: str, other: str) -> None:
    assert is_same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1.5", "15"), ("-3", "3"), ("3:45", "345"), ("a", ""), ("+", "-"), ("than", "n"), ("red", "red blue")],
)
def test_what_matters_stays(one: str, other: str) -> None:
    assert not is_same(one, other)


@given(st.text())
def test_normalising_once_is_enough(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
    assert is_same(text, f" {text.strip()}\n")


def test_any_of_the_right_answers_is_right() -> None:
    assert is_right("The Stop sign.", ["halt", "stop sign"])
    assert not is_right("go", ["halt", "stop sign"])


@given(st.lists(numbers, min_size=1))
def test_a_spread_lies_within_its_values(values: list[float]) -> None:
    found = spread([*values, math.nan])
    assert found is not None
    assert found.n == len(values)
    assert min(values) == found.smallest <= found.p10 <= found.median <= found.p90 <= found.largest
    assert found.largest == max(values)
    assert found.smallest - 1e-6 <= found.mean <= found.largest + 1e-6
    assert percentile(sorted(values), 0.5) == pytest.approx(found.median)


def test_without_values_there_is_no_number() -> None:
    assert spread([math.nan]) is None
    assert (share([]).share, str(share([]))) == (None, "-")
    assert str(share([True, True, False, True])) == "75.0 % (30-95), n 4"


def test_conditions_are_named_by_their_rates_and_only_pruned_ones_take_regions() -> None:
    conditions = make_conditions([0.889, 0.5, 0.889], "plc", control=True)
    assert [one.name for one in conditions] == ["unpruned", "unpruned again", "rate 0.889", "rate 0.5"]
    own = {"regions": [[[0, 0, 1, 1]]], "question": "?"}
    assert conditions[0].field_for(own) == {"method": "off"} == conditions[1].field_for(own)
    assert conditions[3].field_for(own) == {**own, "method": "plc", "pruning_rate": 0.5}
    assert [dict(one.crop) for one in make_conditions([], None, control=False)] == [{"method": "off"}, {}]


def test_every_condition_comes_first_equally_often() -> None:
    conditions = make_conditions([0.5], None, control=True)
    firsts = [asking_order(conditions, 0, index)[0].name for index in range(300)]
    assert all(firsts.count(one.name) > 70 for one in conditions)
    assert asking_order(conditions, 3, 5) == asking_order(conditions, 3, 5)


def test_a_picture_is_new_once() -> None:
    seen = SeenPictures()
    assert [seen.are_new(keys) for keys in (["a"], ["a"], ["b", "a"], ["b"], ["c"])] == [
        *(True, False, True, False, True)
    ]


# Reading


def write_lines(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


def test_a_line_is_a_question_with_what_is_known_of_it(folder: Path) -> None:
    boxes = [[0.0, 0.1, 0.5, 0.6]]
    path = write_lines(
        folder,
        {"image": "b.jpg", "question": "Colour?", "answer": "red", "regions": boxes, "id": 7, "note": {}},
        "",
        {"image": "https://example.com/x.png", "question": "?", "answers": ["a", 3]},
    )
    first, second = read_data(path, None, None, None).questions
    assert (first.name, first.answers, first.crop) == ("7", ("red",), {"regions": [boxes]})
    (url,) = image_urls(first.to_send())
    assert url.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(url.partition(",")[2]) == (folder / "b.jpg").read_bytes()
    assert (second.name, second.answers, second.crop) == ("line 3", ("a", "3"), {})
    assert list(image_urls(second.to_send())) == ["https://example.com/x.png"]
    assert second.pictures() == [None]
    assert [one and one.size for one in first.pictures()] == [(40, 30)]


def test_logged_requests_are_read_in_both_formats(folder: Path) -> None:
    messages = question_about(Image.new("RGB", (20, 20)), "How many?")
    talk = [{"role": "user", "content": "Hello"}]
    crop = {"regions": [[0, 0, 0.5, 0.5]], "method": "ilp", "pruning_rate": 0.2}
    path = write_lines(
        folder,
        {"messages": messages, "crop": crop, "temperature": 0.7, "tools": [], "stop": ["."], "answer": "2"},
        {"custom_id": "r-1", "body": {"messages": messages, "model": "m", "top_p": 1}},
        {"messages": talk},
    )
    data = read_data(path, None, None, None)
    logged, batched = data.questions
    assert data.without_image == 1
    assert data.not_sent == {"tools": 1, "top_p": 1}
    assert list(logged.messages) == messages
    assert (logged.text, logged.answers, logged.body) == ("How many?", ("2",), {"stop": ["."]})
    assert logged.crop == {"regions": [[0, 0, 0.5, 0.5]]}, "method and rate are what is compared"
    assert batched.name == "r-1"
    assert [one and one.size for one in batched.pictures()] == [(20, 20)]


BAD_LINES = {
    "{": "no JSON",
    "[1]": "must be a JSON object",
    '{"question": "?"}': "image: field required",
    '{"image": "a.png"}': "question: field required",
    '{"image": "a.png", "question": ""}': "question: string should have at least 1 character",
    '{"image": "a.png", "question": "?", "answers": "x"}': "answers: input should be a valid list",
    '{"image": "none.png", "question": "?"}': "image: there is no file",
    '{"image": "questions.jsonl", "question": "?"}': "is no image that Pillow can read",
    '{"image": "ftp://x/y.png", "question": "?"}': "image: must be a path, or a URL",
    '{"image": "data:text/html,x", "question": "?"}': "image: must be a path, or a URL",
    '{"image": "a.png", "question": "?", "regions": [[0, 0, 2, 1]]}': "regions: a box must be four fractions",
    '{"image": "a.png", "question": "?", "regions": []}': "regions: must be null, a box",
    '{"messages": []}': "messages: must be a list",
    '{"body": 3}': "messages: must be a list",
    '{"messages": [{"content": "x"}]}': "messages[0]: must be an object with a role",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}': "leave it out",
    json.dumps({"messages": about("http://x/y", "?"), "crop": {"rate": 1}}): "crop.rate",
    json.dumps({"messages": about("http://x/y", "?"), "crop": {"regions": []}}): "one entry per image",
    json.dumps({"messages": about("http://x/y", "?"), "crop": 3}): "crop: must be an object",
}


def test_bad_lines_are_named_all_at_once(folder: Path) -> None:
    good = {"image": "a.png", "question": "?"}
    for line, complaint in BAD_LINES.items():
        path = write_lines(folder, good, line)
        with pytest.raises(DataError, match="line 2: ") as error:
            read_data(path, None, None, None)
        assert complaint in str(error.value)
    with pytest.raises(DataError, match=r"13 bad") as error:
        read_data(write_lines(folder, *["{"] * 13), None, None, None)
    assert "line 10: " in str(error.value)
    assert str(error.value).endswith("... and 3 more")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\n\n"])
def test_a_file_without_questions_is_refused(folder: Path, content: bytes) -> None:
    path = folder / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_data(path, None, None, None)


def test_a_folder_needs_a_question_and_a_file_has_its_own(folder: Path) -> None:
    data = read_data(folder, "What is this?", None, None)
    assert [(one.name, one.text) for one in data.questions] == [
        ("a.png", "What is this?"),
        ("b.jpg", "What is this?"),
    ]
    with pytest.raises(DataError, match="--question"):
        read_data(folder, None, None, None)
    with pytest.raises(DataError, match="--question"):
        read_data(write_lines(folder, {"image": "a.png", "question": "?"}), "What?", None, None)


def test_a_limit_takes_the_first_or_a_sample(folder: Path) -> None:
    path = write_lines(folder, *({"image": "a.png", "question": str(n)} for n in range(50)))

    def texts(limit: int, seed: int | None) -> list[str]:
        return [one.text for one in read_data(path, None, limit, seed).questions]

    assert texts(3, None) == ["0", "1", "2"]
    assert texts(99, 0) == [str(n) for n in range(50)]
    assert texts(5, 1) == texts(5, 1) != texts(5, 2)
    assert texts(5, 1) == sorted(texts(5, 1), key=int)


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["role", "content", "image_url", "url", "type", "text"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_message_can_be_looked_at(value: Any) -> None:
    messages = [{"role": "user", "content": value}]
    assert all(isinstance(url, str) for url in image_urls(messages))
    assert isinstance(last_text(messages), str)


# Scores and sums


def test_the_answers_tokens_follow_the_prompts() -> None:
    assert answer_tokens([1, 2, 7, 8], [1, 2], [7, 8, 0]) == (7, 8)
    assert answer_tokens([1, 2, 7, 8], [1, 2], [7, 8]) == (7, 8)
    with pytest.raises(ValueError, match="chat template"):
        answer_tokens([1, 3, 7], [1, 2], [7])
    for forced in ([1, 2], [1, 2, 7, 9], [1, 2, 7]):
        with pytest.raises(ValueError, match="other tokens"):
            answer_tokens(forced, [1, 2], [7, 8, 0])


def reply(
    text: str,
    tokens_avg: float,
    logprobs: tuple[float, ...] | None = None,
    whole: bool = True,
    ttft_ms: float = 100.0,
    new: bool = False,
    **image: Any,
) -> Reply:
    facts = {
        "tokens": 100,
        "tokens_after_plc": 50,
        "tokens_avg": tokens_avg,
        "localizer_ms": None,
        "images": [{"tokens": 100, "tokens_avg": tokens_avg, "source": "request", "region": None, **image}],
    }
    tokens = tuple(map(ord, text))
    score = None if logprobs is None else Score(logprobs, whole, "" if whole else "visual tokens are evicted")
    return Reply(CropAnswer(text, facts, 60, ttft_ms, len(tokens), tokens), new, score)


def asked(question: Question, unpruned: Reply | None, pruned: Reply | None) -> Asked:
    named = {UNPRUNED.name: unpruned, PRUNED.name: pruned}
    return Asked(question, {name: one for name, one in named.items() if one is not None})


def question(text: str = "?", *answers: str, picture: Path | None = None) -> Question:
    return Question("q", text, tuple(about("http://x/y", text)), answers, picture=picture)


SOME = [
    asked(
        question("1", "red"),
        reply("Red.", 100, (-0.1, -0.1), ttft_ms=200),
        reply("red", 40, (-0.3, -0.2), ttft_ms=100, localizer={"outcome": "region"}),
    ),
    asked(
        question("2", "two"),
        reply("two", 100, (-0.2, -0.4), ttft_ms=100, new=True),
        reply("three", 20, (-1.2,), whole=False, ttft_ms=60),
    ),
    asked(question("3"), reply("x", 100, (-0.5,)), reply("x", 100, (-0.5,), localizer={"outcome": "global"})),
    asked(question("4"), None, reply("y", 40)),
]


def test_sums_are_what_a_pocket_calculator_says() -> None:
    base, pruned = summarize(SOME, (UNPRUNED, PRUNED))
    assert (base.answered, pruned.answered, pruned.compared, pruned.pruned) == (3, 4, 3, 2)
    found = pruned.agreement
    assert (found.exact.count, found.normalised.count, found.first_token.count) == (1, 2, 2)
    assert (found.exact.n, pruned.agreement_if_pruned.normalised.n) == (3, 2)
    assert pruned.agreement_if_pruned.normalised.count == 1
    gap, first = pruned.answer_gap, pruned.first_token_gap
    assert gap is not None
    assert first is not None
    assert (gap.answers, gap.tokens, first.answers) == (2, 3, 3)
    assert gap.mean == pytest.approx((0.2 + 0.1 + 0) / 3)
    assert (gap.by_answer.smallest, gap.by_answer.largest) == pytest.approx((0, 0.15))
    assert first.mean == pytest.approx((0.2 + 1.0 + 0) / 3)
    assert pruned.why_first_token == {"visual tokens are evicted": 1}
    assert pruned.outcomes == {"region": 1, "region sent": 2, "global": 1}
    assert pruned.accuracy is not None
    assert (pruned.accuracy.right.count, pruned.accuracy.right.n) == (1, 2)
    assert (pruned.accuracy.unpruned.count, pruned.accuracy.lost, pruned.accuracy.gained) == (2, 1, 0)
    costs = pruned.costs
    assert costs.kv_tokens is not None
    assert costs.kv_tokens.mean == pytest.approx(10 + (40 + 20 + 100 + 40) / 4)
    assert costs.ttft_ratio is not None, "where the picture was known to both"
    assert (costs.ttft_ratio.n, costs.ttft_ratio.median) == (2, 0.75)
    assert base.costs.ttft_new_ms is not None
    assert base.costs.ttft_new_ms.n == 1
    assert [differs(one) for one in SOME] == [False, True, False, False]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab"), st.booleans(), st.booleans())))
def test_shares_add_up(answers: list[tuple[str, str, bool, bool]]) -> None:
    some = [
        asked(
            question("?", "a"), reply(one, 100) if has_one else None, reply(other, 10) if has_other else None
        )
        for one, other, has_one, has_other in answers
    ]
    _, pruned = summarize(some, (UNPRUNED, PRUNED))
    pairs = [(one, other) for one, other, has_one, has_other in answers if has_one and has_other]
    same = sum(one == other for one, other in pairs)
    assert (pruned.agreement.exact.count, pruned.agreement.exact.n) == (same, len(pairs))
    assert pruned.agreement == pruned.agreement_if_pruned
    assert sum(map(differs, some)) == len(pairs) - same
    if pruned.accuracy is not None:
        accuracy = pruned.accuracy
        assert accuracy.right.count - accuracy.unpruned.count == accuracy.gained - accuracy.lost


# What is shown


def report_of(some: list[Asked], stopped: bool = False) -> Report:
    setup = ServerSetup("http://localhost:1/v1", "M", None, None, {})
    outcome = Outcome(setup, (UNPRUNED, PRUNED), len(some), some, stopped)
    data = Data(tuple(one.question for one in some), 2, {"tools": 1}, len(some))
    return make_report(outcome, data, {"concurrency": 1}, {"command": ["vllm-crop"]})


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_models_and_files_say_is_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), "white").save(tmp_path / "p.png")
    hostile = Question(HOSTILE, HOSTILE, (), (HOSTILE,), picture=tmp_path / "p.png")
    region = [[0.25, 0.25, 0.5, 0.5]]
    one = asked(hostile, reply("x", 100), reply(HOSTILE, 10, region=region, source=HOSTILE))
    one.failures.append(Failure(HOSTILE, PRUNED.name, "score", HOSTILE))
    page = Tags(render_page(report_of([one]), 10))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert names.count("img") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(HOSTILE) == 8  # name, question, right answer, answer, source twice, failure twice
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert source is not None
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as drawn:
        assert max(drawn.size) == 480
        frame = drawn.convert("RGB").getpixel((120, 120))
    assert isinstance(frame, tuple)
    assert max(abs(got - wanted) for got, wanted in zip(frame, REGION_COLOUR, strict=True)) < 60


def test_the_page_counts_what_it_does_not_show() -> None:
    some = [asked(question(f"question {n}"), reply("a", 100), reply("b", 10)) for n in range(5)]
    page = render_page(report_of(some), 2)
    assert "Questions whose answers differ: 5" in page
    assert "The first 2 are shown; 3 more are in the JSON file." in page
    assert page.count('<section class="card">') == 2
    assert "is not here" in page, "pictures of URLs are not fetched"
    assert '<section class="card">' not in render_page(report_of(SOME[2:]), 2)


def test_a_region_is_drawn_on_a_picture_of_any_mode() -> None:
    for mode in ("1", "L", "P", "RGBA", "I;16", "CMYK"):
        drawing = draw_region(Image.new(mode, (300, 100)), Region((Box(0, 0, 1, 1),)), 150)
        assert (drawing.mode, drawing.size) == ("RGB", (150, 50))
        assert drawing.getpixel((1, 1)) == REGION_COLOUR
    plain = Image.new("RGB", (30, 20), "blue")
    assert draw_region(plain, None, 150).tobytes() == plain.tobytes()


def test_the_json_is_json_and_says_how_it_was_measured(tmp_path: Path) -> None:
    some = [*SOME, asked(question("5"), reply("", 100, ttft_ms=math.nan), reply("\ud800", 10))]
    report = report_of(some, stopped=True)
    write_json(tmp_path / "result.json", report)
    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert found["questions"][4]["replies"]["unpruned"]["ttft_ms"] is None
    assert {"provenance", "server", "setting", "data", "summary", "questions", "failures"} <= set(found)
    assert found["summary"][1]["agreement"]["exact"]["n"] == 4
    assert any("Stopped: 5 of 5" in note for note in found["notes"])
    assert any("tools (1)" in note for note in found["notes"])
    assert any("first token alone" in note for note in report_json(report)["notes"])


def test_the_table_has_a_cell_for_every_condition() -> None:
    rows = dict(table_rows(summarize(SOME, (UNPRUNED, PRUNED))))
    assert {len(cells) for cells in rows.values()} == {2}
    assert rows["same, normalised"] == ["", "66.7 % (21-94), n 3"]
    assert rows["  lost, gained"] == ["", "1, 0"]
    assert AGAIN.name not in rows


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "x", "a\ud800")
    assert (tmp_path / "new" / "x").read_text() == "a?"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


# The command


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["compare", *options], env={"COLUMNS": "200"})


def test_a_bad_file_is_refused_before_anything_is_asked(folder: Path) -> None:
    path = write_lines(folder, {"image": "a.png", "question": "?"}, {"image": "gone.png", "question": "?"})
    finished = run("--base-url", "http://127.0.0.1:9/v1", "--data", str(path), "--out", str(folder / "out"))
    assert finished.exit_code == 1
    assert "line 2: image: there is no file" in finished.output
    assert not (folder / "out").exists()


def test_a_server_that_is_not_there_is_said_so(folder: Path) -> None:
    path = write_lines(folder, {"image": data_url(Image.new("RGB", (9, 9))), "question": "?"})
    finished = run("--base-url", "http://127.0.0.1:9/v1", "--data", str(path), "--out", str(folder / "out"))
    assert finished.exit_code == 1
    assert "does not answer as an OpenAI-compatible server" in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize("options", [("--rate", "1"), ("--method", "off"), ("--concurrency", "0")])
def test_wrong_options_are_refused(folder: Path, options: tuple[str, ...]) -> None:
    finished = run("--base-url", "http://x/v1", "--data", str(folder), "--question", "?", *options)
    assert finished.exit_code == 2
    assert options[0] in finished.output
