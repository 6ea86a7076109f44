# SPDX-License-Identifier: Apache-2.0
"""Asking over HTTP, with a stand-in for the server."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from PIL import Image

from lab.evaluation.asking import Answer, Asked, SceneTask, ask
from lab.evaluation.conditions import OFF, SERVER, Condition
from lab.evaluation.questions import make_test_set
from lab.evaluation.served.endpoint import EndpointAnswers, EndpointError
from vllm_crop.config import CropConfig
from vllm_crop.families.qwen_vl import SmartResize

openai = pytest.importorskip("openai")


class Handler(BaseHTTPRequestHandler):
    """Answers with the question's last word; refuses `crop` when told to."""

    received: ClassVar[list[dict[str, Any]]] = []
    refuses: ClassVar[bool] = False
    facts: ClassVar[dict[str, Any] | None] = None

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        if self.refuses and "crop" in body:
            self.reply(400, {"error": {"message": "crop: unknown field"}})
            return
        word = body["messages"][0]["content"][-1]["text"].split()[-1]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": word}}
        usage = {"prompt_tokens": 99, "completion_tokens": 1, "total_tokens": 100}
        self.reply(200, {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.facts is not None:
            self.send_header("x-crop-facts", json.dumps({"images": [self.facts]}))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Counts:
    """Stands in for Accounting."""

    resize = SmartResize(16, 16 * 16**2, 2**24)
    config: CropConfig | None = None

    def __init__(self) -> None:
        self.counted: list[Any] = []

    def check(self, asked: list[Asked]) -> None:
        assert asked

    def answer(self, asked: Asked, text: str, prompt_tokens: int, steps: int) -> Answer:
        self.counted.append(asked.crop)
        return Answer(text, 1.0, 2.0, prompt_tokens, steps=steps)


@pytest.fixture
def url() -> Iterator[str]:
    Handler.received, Handler.refuses, Handler.facts = [], False, None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture
def tasks() -> list[SceneTask]:
    return [SceneTask(s, tuple(q.region(8) for q in s.questions)) for s in make_test_set(2)]


def test_questions_are_sent_as_images_words_and_crop(url: str, tasks: list[SceneTask]) -> None:
    condition = Condition("plc", "oracle", 0.889)
    endpoint = EndpointAnswers(Counts(), url)  # type: ignore[arg-type]
    rows = endpoint.answer(condition, tasks)
    assert [[answer.text for answer in row] for row in rows] == [
        [question.text.split()[-1] for question in task.scene.questions] for task in tasks
    ]
    sent = {json.dumps(body["crop"]): body for body in Handler.received}
    for task in tasks:
        for asked in ask(condition, task, Counts.resize):
            body = sent[json.dumps(asked.crop)]
            assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, asked.steps)
    image_url = Handler.received[0]["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(image_url.partition(",")[2])))
    assert picture.size == (384, 384)


def test_unpruned_questions_carry_no_crop(url: str, tasks: list[SceneTask]) -> None:
    EndpointAnswers(Counts(), url).answer(OFF, tasks)  # type: ignore[arg-type]
    assert not any("crop" in body for body in Handler.received)


def test_a_server_with_the_plugin_is_told_what_to_answer_unpruned(url: str, tasks: list[SceneTask]) -> None:
    counts = Counts()
    counts.config = CropConfig()
    EndpointAnswers(counts, url).answer(OFF, tasks)  # type: ignore[arg-type]
    assert all(body["crop"] == {"method": "off"} for body in Handler.received)
    assert set(counts.counted) == {None}


def test_a_refusal_says_what_may_be_missing(url: str, tasks: list[SceneTask]) -> None:
    Handler.refuses = True
    endpoint = EndpointAnswers(Counts(), url)  # type: ignore[arg-type]
    with pytest.raises(EndpointError, match="--plugin crop"):
        endpoint.answer(Condition("plc", "oracle", 0.889), tasks)


@pytest.mark.parametrize("region", [[[0.25, 0.25, 0.5, 0.5]], None])
def test_what_the_server_finds_is_counted_by_its_facts(url: str, tasks: list[SceneTask], region: Any) -> None:
    Handler.facts = {"region": region, "localizer": {"outcome": "region"}}
    counts = Counts()
    EndpointAnswers(counts, url).answer(Condition("plc", SERVER, 0.889), tasks)  # type: ignore[arg-type]
    sent = {"pruning_rate": 0.889, "method": "plc"}
    assert [body["crop"] for body in Handler.received] == [sent] * len(Handler.received)
    assert counts.counted == [{**sent, "regions": [region]}] * len(Handler.received)


@pytest.mark.parametrize("facts", [None, {"region": None, "source": "none"}])
def test_a_server_without_a_localizer_is_an_error(url: str, tasks: list[SceneTask], facts: Any) -> None:
    Handler.facts = facts
    endpoint = EndpointAnswers(Counts(), url)  # type: ignore[arg-type]
    with pytest.raises(EndpointError, match="localizer"):
        endpoint.answer(Condition("plc", SERVER, 0.889), tasks)


def test_nobody_at_the_address() -> None:
    with pytest.raises(EndpointError, match="is it up"):
        EndpointAnswers(Counts(), "http://127.0.0.1:9/v1")  # type: ignore[arg-type]
