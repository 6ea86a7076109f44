# SPDX-License-Identifier: Apache-2.0
"""Regions from another server: a real `vllm serve` that goes and comes back, and one that misbehaves."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from lab.evaluation.questions import make_test_set
from lab.tinyvqa.drawing import THUMBNAIL
from tests.e2e.conftest import MODEL, OPTIONS, REMOTE_MODEL, metric, serve
from tests.tinyvqa import CHECKPOINT, ask, crop_options, found, said_of_thumbnail
from vllm_crop.measuring.server import HOST, Server, free_port, get_text

pytestmark = pytest.mark.e2e

SCENES = make_test_set(4, seed=4)
LOCAL = [(scene, q.text) for scene in SCENES for q in scene.questions if q.boxes]
DEADLINE_S = 2.0
SUSPEND_AFTER, SUSPEND_S = 4, 4.0
KEY_VARIABLE, KEY = "LOCALIZER_KEY", "localizer-sekret"


class Misbehaving:
    """An HTTP server that answers as it is told: `mode` is a status with a body, or how it goes wrong."""

    def __init__(self) -> None:
        self.mode: Any = "slow"
        self.seen: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, dict(self.headers)))
                outer.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.mode == "slow":
            time.sleep(3 * DEADLINE_S)
            return
        if self.mode == "redirecting":
            handler.send_response(307)
            handler.send_header("Location", f"{self.url}/elsewhere")
            handler.end_headers()
            return
        if self.mode in ("endless", "promising", "bomb"):
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            if self.mode == "promising":
                handler.send_header("Content-Length", str(400 << 20))
            if self.mode == "bomb":
                handler.send_header("Content-Encoding", "gzip")
            handler.end_headers()
            body = gzip.compress(b" " * (100 << 20)) if self.mode == "bomb" else b" " * (1 << 20)
            with suppress(OSError):  # whoever asked has gone away
                for _ in range(1 if self.mode == "bomb" else 400):
                    handler.wfile.write(body)
            handler.close_connection = True
            return
        status, body = self.mode
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


def completion(text: Any, **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


def confident(logprob: str) -> bytes:
    """A legal place, with one token of this probability, as JSON or what Python takes for it."""
    marked = completion("2335", logprobs={"content": [{"token": "2", "logprob": 12345, "top_logprobs": []}]})
    return marked.replace(b"12345", logprob.encode())


class Relay:
    """One address on which now this server answers, now that one, or nobody."""

    def __init__(self) -> None:
        self.port = free_port()
        self.target = self.port
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def to(self, port: int) -> None:
        """Hand connections on to a port, from the next one on."""
        if self._listener is not None and self.target == port:
            return
        self.stop()
        self.target = port
        self._listener = socket.create_server((HOST, self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Cut all connections; further ones are refused."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for one in self._open:
            _cut(one)
        self._listener, self._open = None, []

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((HOST, self.target))
                self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    _cut(source)
    _cut(sink)


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    one = Relay()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def served(relay: Relay, logs: Path) -> Iterator[tuple[Server, openai.OpenAI]]:
    """A server whose localizer is at the relay, with a client of it."""
    settings = {
        "kind": "openai",
        "base_url": relay.url,
        "model": REMOTE_MODEL,
        "prompt": "where:{question}",
        "thumbnail_side": 8 * THUMBNAIL,
        "timeout_s": DEADLINE_S,
        "api_key_env": KEY_VARIABLE,
        "suspend_after": SUSPEND_AFTER,
        "suspend_s": SUSPEND_S,
    }
    crop, log = crop_options(settings), logs / "with_remote.log"
    with serve(str(CHECKPOINT), *crop, *OPTIONS, log_path=log, env={KEY_VARIABLE: KEY}) as running:
        yield running, openai.OpenAI(base_url=f"{running.base_url}/v1", api_key="unused", max_retries=0)


def test_right_regions_gone_and_back(
    served: tuple[Server, openai.OpenAI], stock_server: Server, relay: Relay
) -> None:
    server, client = served
    port = int(stock_server.base_url.rsplit(":", 1)[1])
    scene, question = LOCAL[0]
    direct = openai.OpenAI(base_url=f"{stock_server.base_url}/v1", api_key="unused")
    said_of_thumbnail(direct, scene.picture(), question, REMOTE_MODEL)  # the first time takes seconds
    relay.to(port)
    first = [found(ask(client, scene.picture(), question)) for scene, question in LOCAL]
    for image, (_, text) in zip(first, LOCAL, strict=True):
        assert image["source"] == "openai"
        assert image["localizer"]["outcome"] in ("region", "global"), (text, image)
        assert 0 < image["localizer"]["confidence"] <= 1
    truth = {q.text: q for scene in SCENES for q in scene.questions}
    exact = [
        image["region"] == [[pytest.approx(s, abs=1e-4) for s in box] for box in _boxes(truth[text])]
        for image, (_, text) in zip(first, LOCAL, strict=True)
    ]
    assert sum(exact) >= 0.6 * len(exact)
    relay.stop()
    failed = metric(server, "crop:localizations_total", outcome="error")
    picture = scene.picture()
    picture.putpixel((0, 0), (1, 2, 3))
    start = time.monotonic()
    image = found(ask(client, picture, question))
    assert time.monotonic() - start < DEADLINE_S + 3
    assert image["localizer"]["outcome"] == "error"
    assert image["tokens_after_plc"] == 576
    assert metric(server, "crop:localizations_total", outcome="error") == failed + 1
    assert found(ask(client, scene.picture(), question))["localizer"]["cached"]  # known before
    relay.to(port)
    assert found(ask(client, picture, question))["region"] == first[0]["region"]


def _boxes(question: Any) -> list[list[float]]:
    boxes: list[list[float]] = question.region(8).as_lists()
    return boxes


BAD: dict[str, tuple[Any, str]] = {
    "slow": ("slow", "timeout"),
    "redirecting": ("redirecting", "error"),
    "html": ((200, b"<html>hello</html>"), "unreadable"),
    "an empty body": ((200, b""), "unreadable"),
    "bytes": ((200, bytes(range(256)) * 40), "unreadable"),
    "an empty object": ((200, b"{}"), "unreadable"),
    "a list": ((200, b"[1, 2]"), "unreadable"),
    "no choices": ((200, b'{"choices": []}'), "unreadable"),
    "no text": ((200, completion(None)), "unreadable"),
    "a number for text": ((200, completion(5)), "unreadable"),
    "prose": ((200, completion("It is near the top.")), "unreadable"),
    "a megabyte": ((200, completion("0" * 1_000_000)), "unreadable"),
    "cells that are none": ((200, completion("9999")), "unreadable"),
    "logprobs of another shape": ((200, completion("2335", logprobs={"content": [5]})), "unreadable"),
    "a confidence that is no number": ((200, confident("NaN")), "unreadable"),
    "an infinite confidence": ((200, confident("-Infinity")), "unreadable"),
    "a confidence in words": ((200, confident('"sure"')), "unreadable"),
    "a confidence of thousands of digits": ((200, confident("1" * 5000)), "unreadable"),
    "nested without end": ((200, b"[" * 200_000), "unreadable"),
    "400 megabytes": ("endless", "unreadable"),
    "a promise of 400 megabytes": ("promising", "unreadable"),
    "a bomb": ("bomb", "unreadable"),
    "out of order": ((500, b"oops"), "error"),
    "busy": ((429, b"{}"), "error"),
    "another key": ((401, b"{}"), "error"),
}


@pytest.fixture(scope="module")
def remote() -> Iterator[Misbehaving]:
    one = Misbehaving()
    yield one
    one.server.shutdown()


@pytest.fixture
def misbehaving(remote: Misbehaving, relay: Relay) -> Misbehaving:
    """The remote behind the relay, which has seen nothing yet."""
    relay.to(remote.server.server_address[1])
    remote.seen.clear()
    return remote


@pytest.mark.parametrize("name", BAD)
def test_a_remote_that_misbehaves_costs_its_deadline_at_most(
    served: tuple[Server, openai.OpenAI], misbehaving: Misbehaving, name: str
) -> None:
    server, client = served
    misbehaving.mode, outcome = BAD[name]
    before = metric(server, "crop:localizations_total", outcome=outcome)
    picture = LOCAL[0][0].picture()
    picture.putpixel((0, 0), (list(BAD).index(name), 0, 0))
    start = time.monotonic()
    response = ask(client, picture, LOCAL[0][1])
    assert time.monotonic() - start < DEADLINE_S + 3
    assert response.parse().choices[0].message.content
    image = found(response)
    assert (image["source"], image["localizer"]["outcome"], image["region"]) == ("openai", outcome, None)
    assert image["tokens_after_plc"] == 576
    assert metric(server, "crop:localizations_total", outcome=outcome) == before + 1
    assert {path for path, _ in misbehaving.seen} == {"/v1/chat/completions"}, "a redirect was followed"
    get_text(f"{server.base_url}/health")


def test_a_remote_that_behaves_again_is_believed(
    served: tuple[Server, openai.OpenAI], misbehaving: Misbehaving
) -> None:
    _, client = served
    misbehaving.mode = 200, completion("2335")
    picture = LOCAL[0][0].picture()
    picture.putpixel((0, 0), (255, 0, 0))
    image = found(ask(client, picture, LOCAL[0][1]))
    assert image["region"] == [[0.25, 0.375, 0.5, 0.75]]
    assert image["localizer"]["confidence"] is None
    ((_, headers),) = misbehaving.seen
    assert headers["authorization" if "authorization" in headers else "Authorization"] == f"Bearer {KEY}"


def test_a_remote_that_hangs_is_left_alone_and_asked_again(
    served: tuple[Server, openai.OpenAI], misbehaving: Misbehaving
) -> None:
    server, client = served
    scene, question = LOCAL[0]

    def answered(number: int) -> tuple[str, float]:
        picture = scene.picture()
        picture.putpixel((0, 0), (9, 9, number))
        start = time.monotonic()
        image = found(ask(client, picture, question))
        return image["localizer"]["outcome"], time.monotonic() - start

    misbehaving.mode = "slow"
    hanging = [answered(number) for number in range(SUSPEND_AFTER + 3)]
    assert [outcome for outcome, _ in hanging] == ["timeout"] * SUSPEND_AFTER + ["suspended"] * 3
    assert all(seconds < DEADLINE_S for outcome, seconds in hanging if outcome == "suspended")
    assert metric(server, "crop:localizer_suspensions_total") == 1
    time.sleep(SUSPEND_S)
    misbehaving.mode = 200, completion("2335")
    assert [answered(10 + number)[0] for number in range(3)] == ["region"] * 3
    warnings = [line for line in server.log_path.read_text().splitlines() if "WARNING" in line]
    assert sum("in a row" in line or "answers again" in line for line in warnings) == 2


def test_whatever_a_remote_says_is_a_line_of_the_log_at_most(served: tuple[Server, openai.OpenAI]) -> None:
    server, _ = served
    log = server.log_path.read_text()
    assert "Traceback" not in log
    assert "\nERROR" not in log


def test_the_key_is_in_no_log(served: tuple[Server, openai.OpenAI]) -> None:
    server, _ = served
    assert MODEL in server.log_path.read_text()
    assert KEY not in server.log_path.read_text()
