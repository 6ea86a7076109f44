# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop compare` as a user runs it, against a real server with the trained model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import vllm

from lab.evaluation.questions import make_test_set
from tests.e2e.conftest import API_KEY, MODEL, metric
from vllm_crop.client import question_about
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

PROGRAM = (sys.executable, "-c", "from vllm_crop.commands.app import app; app()", "compare")
SCENES = make_test_set(3, seed=11)
SUCCEEDED = "vllm:request_success_total"
CORNER = [[0.0, 0.0, 0.125, 0.125]]  # one cell of the 8x8 grid


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as PNG and their questions with answers: without a region, and with a wrong one."""
    folder = tmp_path_factory.mktemp("questions")
    plain: list[dict[str, Any]] = []
    for index, scene in enumerate(SCENES):
        scene.picture().save(folder / f"{index}.png")
        plain += [
            {"image": f"{index}.png", "question": q.text, "answer": q.answer, "family": q.family}
            for q in scene.questions
        ]
    write(folder / "plain.jsonl", plain)
    write(folder / "wrong.jsonl", [{**line, "regions": CORNER} for line in plain])
    return folder


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def command(server: Server, data: Path, out: Path, *options: str) -> list[str]:
    asked = ("--base-url", f"{server.base_url}/v1", "--data", str(data), "--out", str(out))
    return [*PROGRAM, *asked, "--max-tokens", "5", *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OPENAI_API_KEY": API_KEY, "COLUMNS": "160", **more}


def compare(server: Server, data: Path, out: Path, *options: str) -> tuple[Any, str, str]:
    """Run the command; its JSON, its page and what it printed."""
    finished = subprocess.run(
        command(server, data, out, *options),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment(),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((out / "result.json").read_text())
    return found, (out / "index.html").read_text(), finished.stdout


def of(found: Any, name: str) -> Any:
    (one,) = [one for one in found["summary"] if one["name"] == name]
    return one


def test_without_pruning_everything_agrees(localizing_server: Server, data: Path, tmp_path: Path) -> None:
    found, page, printed = compare(localizing_server, data / "plain.jsonl", tmp_path, "--rate", "0")
    for name in ("unpruned again", "rate 0"):
        one = of(found, name)
        assert (one["compared"], one["pruned"], one["failures"]) == (15, 0, {})
        for share in one["agreement"].values():
            assert (share["count"], share["n"]) == (15, 15)
        assert one["answer_gap"]["answers"] == 15
        assert one["answer_gap"]["mean"] == pytest.approx(0, abs=1e-3)
    assert "Questions whose answers differ: 0" in page
    assert "Nothing was pruned" in printed
    assert found["server"]["model"] == MODEL
    assert found["server"]["vllm_version"] == vllm.__version__


def test_regions_the_server_finds_keep_answers(localizing_server: Server, data: Path, tmp_path: Path) -> None:
    found, _, printed = compare(localizing_server, data / "plain.jsonl", tmp_path)
    one, off = of(found, "server's rate"), of(found, "unpruned")
    assert found["server"]["served"]["server's rate"]["pruning_rate"] == 0.889
    assert one["outcomes"].get("region", 0) >= 8
    assert one["pruned"] >= 8
    assert one["agreement"]["normalised"]["share"] > 0.8
    assert one["accuracy"]["right"]["n"] == 15
    assert one["costs"]["kv_tokens"]["mean"] < off["costs"]["kv_tokens"]["mean"]
    assert one["costs"]["localizer_ms"]["n"] == 15
    assert one["costs"]["localizer_ms"]["median"] < one["costs"]["ttft_known_ms"]["median"]
    # A salt of its own: no request finds the region of another one in the cache.
    replies = [question["replies"]["server's rate"] for question in found["questions"]]
    assert not any(image["localizer"]["cached"] for reply in replies for image in reply["facts"]["images"])
    assert "nats lost per answer token" in printed


def test_wrong_regions_show(localizing_server: Server, data: Path, tmp_path: Path) -> None:
    options = ("--rate", "0.5", "--rate", "0.889", "--max-cards", "2", "--concurrency", "2")
    found, page, _ = compare(localizing_server, data / "wrong.jsonl", tmp_path, *options)
    some, most = of(found, "rate 0.5"), of(found, "rate 0.889")
    assert (most["pruned"], most["outcomes"]) == (15, {"region sent": 15})
    assert most["costs"]["visual_tokens_avg"]["mean"] == pytest.approx(64)
    assert some["costs"]["visual_tokens_avg"]["mean"] == pytest.approx(288)
    different = 15 - most["agreement"]["normalised"]["count"]
    assert different >= 4
    assert most["accuracy"]["lost"] >= 3
    # The sums, from the single answers.
    replies = [question["replies"] for question in found["questions"]]
    gaps = [
        before - after
        for one in replies
        for before, after in zip(
            one["unpruned"]["score"]["logprobs"], one["rate 0.889"]["score"]["logprobs"], strict=True
        )
    ]
    assert most["answer_gap"]["tokens"] == len(gaps)
    assert most["answer_gap"]["mean"] == pytest.approx(sum(gaps) / len(gaps))
    assert most["answer_gap"]["mean"] > 0.1
    exact = sum(one["unpruned"]["text"] == one["rate 0.889"]["text"] for one in replies)
    assert most["agreement"]["exact"]["count"] == exact
    shown = page.count('<section class="card">')
    assert shown == 2
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert f"{different - shown}" in page


def test_a_whole_answer_is_scored_as_it_is_generated(
    localizing_server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probabilities of the forced answer are those the server gives while it answers, unpruned."""
    import openai

    found, _, _ = compare(localizing_server, data / "plain.jsonl", tmp_path, "--rate", "0", "--limit", "4")
    client = openai.OpenAI(base_url=f"{localizing_server.base_url}/v1", api_key=API_KEY)
    questions = [(scene, question) for scene in SCENES for question in scene.questions]
    for (scene, question), asked in zip(questions, found["questions"], strict=False):
        response = client.chat.completions.create(
            model=MODEL,
            messages=question_about(scene.picture(), question.text),
            max_tokens=5,
            temperature=0,
            logprobs=True,
            extra_body={"crop": {"method": "off"}},
        )
        generated = [token.logprob for token in response.choices[0].logprobs.content]
        forced = asked["replies"]["unpruned"]["score"]
        assert forced["whole"]
        assert forced["logprobs"] == pytest.approx(generated[: len(forced["logprobs"])], abs=1e-3)


def test_evictions_are_scored_by_the_first_token(
    localizing_server: Server, data: Path, tmp_path: Path
) -> None:
    options = ("--rate", "0.778", "--method", "ilp", "--limit", "6", "--no-control")
    found, page, printed = compare(localizing_server, data / "wrong.jsonl", tmp_path, *options)
    one = of(found, "rate 0.778")
    assert one["answer_gap"] is None
    assert one["first_token_gap"]["answers"] == 6
    assert one["why_first_token"] == {"visual tokens are evicted": 6}
    assert "first token alone (rate 0.778: 6 visual tokens are evicted)" in " ".join(printed.split())
    costs = one["costs"]
    assert costs["visual_tokens_after_plc"]["mean"] == 576
    assert costs["visual_tokens_avg"]["mean"] == pytest.approx(128, abs=1)
    assert "unpruned again" not in page.split("<ul")[0]


def test_logs_and_folders_are_asked_and_failures_listed(
    localizing_server: Server, data: Path, tmp_path: Path
) -> None:
    scene = SCENES[0]
    messages = question_about(scene.picture(), scene.questions[0].text)
    gone = question_about(scene.picture(), "?")
    gone[0]["content"][0]["image_url"]["url"] = "http://127.0.0.1:9/gone.png"
    lines = [{"custom_id": "a", "body": {"messages": messages, "tools": []}}, {"messages": gone, "id": "b"}]
    found, page, _ = compare(localizing_server, write(tmp_path / "log.jsonl", lines), tmp_path / "log")
    assert of(found, "server's rate")["compared"] == 1
    assert of(found, "server's rate")["failures"] == {"answer": 1}
    assert {failure["question"] for failure in found["failures"]} == {"b"}
    assert "Requests that failed: 3" in page
    assert found["data"]["not_sent"] == {"tools": 1}
    question = ("--question", "what colour is it?", "--limit", "2", "--seed", "1")
    found, _, _ = compare(localizing_server, data, tmp_path / "folder", *question)
    assert len(found["questions"]) == 2
    assert found["questions"][0]["id"].endswith(".png")


def test_what_cannot_be_asked_is_refused_before_anything_is(
    localizing_server: Server, data: Path, tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"image": str(data / "0.png"), "question": "?"}, {"image": "x"}])
    key, wrong_key = environment(), environment(OPENAI_API_KEY="wrong")
    for path, env, options, complaint in (
        (bad, key, (), "line 2: question: field required"),
        (data / "plain.jsonl", wrong_key, (), "is the key in OPENAI_API_KEY?"),
        (data / "plain.jsonl", key, ("--rate", "0.999"), "refuses 'rate 0.999'"),
        (data / "plain.jsonl", key, ("--model", "nobody"), "refuses 'unpruned'"),
    ):
        asked = command(localizing_server, path, tmp_path / "out", *options)
        finished = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=100, env=env)
        assert finished.returncode == 1, finished.stdout + finished.stderr
        assert complaint in finished.stdout
        assert "Traceback" not in finished.stdout + finished.stderr
        assert not (tmp_path / "out").exists()


def test_ctrl_c_writes_what_is_there(localizing_server: Server, data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (data / "plain.jsonl").read_text().splitlines()] * 40
    many = write(data / "many.jsonl", lines)
    asked = metric(localizing_server, SUCCEEDED)
    process = subprocess.Popen(
        command(localizing_server, many, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while metric(localizing_server, SUCCEEDED) < asked + 40:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # or it would go on asking
    assert process.returncode == 130, printed + errors
    assert "Traceback" not in printed + errors
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["data"]["stopped"]
    assert 0 < len(found["questions"]) < len(lines)
    assert of(found, "unpruned")["answered"] == len(found["questions"])
    assert (tmp_path / "index.html").exists()
