# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop check --base-url` at servers that are none, broken, hostile or set up otherwise."""

import gzip
import inspect
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # not what another test puts in its place while a thread of ours still sleeps
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vllm_crop.commands.check import check
from vllm_crop.measuring.endpoint import TIMEOUT_S

app = typer.Typer()
app.command()(check)

NO_SERVER = "this is no OpenAI-compatible server"
FACTS = {"tokens": 100, "tokens_avg": 25.0, "method": "plc", "pruning_rate": 0.75, "images": [{}]}
SETTINGS = {"methods": ["plc"], "version": "0.1.0"}
Answer = tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]


def body_of(value: Any, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return status, {"content-type": "application/json", **named}, json.dumps(value).encode()


def error(status: int, message: str) -> Answer:
    return body_of({"error": {"message": message, "code": status}}, status)


class Fake:
    """A server that says what it is told to by path; `chat` answers by the field `crop` of a request."""

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {
            "/v1/models": body_of({"data": [{"id": "tiny"}]}),
            "/v1/plugins/crop/settings": body_of(SETTINGS),
            "/metrics": (200, {}, b"crop:requests_total 1"),
            "/version": body_of({"version": "0.32.0"}),
        }
        self.chat: Answer | None = None
        self.reads_field = True
        self.has_regions = True
        self.facts: Any = FACTS
        self.asked: list[str] = []

    def answer(self, path: str, body: Any) -> Answer:
        self.asked.append(path)
        if path != "/v1/chat/completions":
            return self.routes.get(path, error(404, "Not Found"))
        if self.chat is not None:
            return self.chat
        crop = body.get("crop") or {} if self.reads_field else {}
        if crop.get("regions") == [[2.0, 0.0, 0.0, 0.0]]:
            return error(400, "crop.regions[0]: four fractions")
        # As on a real server: the body is read before the model is looked for.
        if body["model"] != "tiny":
            return error(404, f"The model `{body['model']}` does not exist.")
        if "regions" in crop and not self.has_regions:
            return error(400, "crop.regions: not possible with this model: all of them are needed")
        pruned = ("regions" in crop or "max_tokens" in crop) and self.facts["method"] not in ("off", "ilp")
        told = {"x_crop_facts": json.dumps(self.facts)} if self.reads_field else {}
        return body_of({"usage": {"prompt_tokens": 30 if pruned else 105}}, **told)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Nobody reads what a hostile server still sends."""


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length") or 0))
            answer = fake.answer(self.path, json.loads(sent) if sent else None)
            if callable(answer):
                answer(self)
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def root(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with served(fake) as url:
        yield url


def asked(base_url: str, *options: str) -> str:
    """What is printed where something does not work, which is one line beside what does."""
    result = CliRunner().invoke(app, ["--base-url", base_url, *options], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def refusal(base_url: str, *options: str) -> str:
    """The last line, which says why nothing more was asked."""
    lines = asked(base_url, *options).splitlines()
    assert lines[-1].split()[:2] == ["fails", "endpoint"]
    assert sum(line.split()[0] == "fails" for line in lines) == 1
    return lines[-1]


def test_a_server_that_prunes(root: str) -> None:
    result = CliRunner().invoke(app, ["--base-url", f"{root}/v1"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert "vllm 0.32.0, vllm-crop 0.1.0" in result.output
    assert "400 visual tokens to 100 on average" in result.output


HTML = b"<html><body>Welcome</body></html>"
NONE = {
    "page": (200, {"content-type": "text/html"}, HTML),
    "broken": (200, {"content-type": "application/json"}, b'{"data": [{"id'),
    "empty": (204, {}, b""),
    "list": body_of([1, 2]),
    "null": body_of(None),
    "string": body_of("data"),
    "no data": body_of({"data": None}),
    "no models": body_of({"data": [1]}),
    "deep": (200, {"content-type": "application/json"}, b"[" * 200_000),
    "no text": (200, {"content-type": "application/json; charset=\xff"}, b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_list_of_models(fake: Fake, root: str, kind: str) -> None:
    fake.routes["/v1/models"] = NONE[kind]
    assert NO_SERVER in refusal(f"{root}/v1")


@pytest.mark.parametrize("kind", [*NONE, "none", "no number"])
def test_what_is_no_answer_to_a_question(fake: Fake, root: str, kind: str) -> None:
    others = {"none": body_of({}), "no number": body_of({"usage": {"prompt_tokens": "many"}})}
    fake.chat = {**NONE, **others}[kind]
    assert NO_SERVER in refusal(f"{root}/v1")


def test_a_page_behind_a_redirect(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = (302, {"location": "/login"}, b"")
    fake.routes["/login"] = NONE["page"]
    assert NO_SERVER in refusal(f"{root}/v1")


def test_no_models_at_all(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = body_of({"data": []})
    assert "it serves no model" in refusal(f"{root}/v1")


@pytest.mark.parametrize(
    "facts",
    [
        {key: value for key, value in FACTS.items() if key != "method"},
        {**FACTS, "tokens": "many"},
        {**FACTS, "tokens_avg": float("nan")},
        {**FACTS, "images": None, "method": "plc"},
        {**FACTS, "images": [1]},
    ],
)
def test_facts_that_are_none(fake: Fake, root: str, facts: Any) -> None:
    fake.chat = body_of({"usage": {"prompt_tokens": 5}}, x_crop_facts=json.dumps(facts))
    assert "x-crop-facts is not as vllm-crop writes it" in refusal(f"{root}/v1")


@pytest.mark.parametrize("kind", NONE)
def test_what_need_not_be_there_may_be_anything(fake: Fake, root: str, kind: str) -> None:
    for path in ("/v1/plugins/crop/settings", "/version", "/metrics"):
        fake.routes[path] = NONE[kind]
    result = CliRunner().invoke(app, ["--base-url", f"{root}/v1"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    states = [line.split()[0] for line in result.output.splitlines()]
    assert states[-3:] == ["absent"] * 3


def drips(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        sleep(0.1)


def drips_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
    for _ in range(300):
        handler.wfile.write(b"a")
        sleep(0.1)


def hangs(handler: BaseHTTPRequestHandler) -> None:
    sleep(30)


def floods(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1 << 12):
        handler.wfile.write(b" " * (1 << 16))


def bombs(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(gzip.compress(b" " * (1 << 26)))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("act", "said"),
    [
        (drips, "no whole answer within 1 s"),
        (drips_headers, "no whole answer within 1 s"),
        (hangs, "no whole answer within 1 s"),
        (floods, "an answer of more than 4 MiB"),
        (bombs, "it compresses answers"),
    ],
)
def test_nothing_is_read_without_end(
    fake: Fake, root: str, path: str, act: Callable[[BaseHTTPRequestHandler], None], said: str
) -> None:
    if path.endswith("completions"):
        fake.chat = act
    else:
        fake.routes[path] = act
    start = time.monotonic()
    assert said in refusal(f"{root}/v1", "--timeout", "1")
    assert time.monotonic() - start < 5


def test_a_hanging_server_ends_in_time_by_default() -> None:
    assert TIMEOUT_S == inspect.signature(check).parameters["timeout"].default <= 20
    assert "default: 20.0" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "begins with neither http:// nor https://: an address reads http://host:port/v1"),
        ("localhost:8000/v1", "begins with neither"),
        ("ftp://localhost/v1", "begins with neither"),
        ("http:///v1", "names no host"),
        ("http://[::1/v1", "cannot be read"),
        ("http://localhost:80000/v1", "cannot be read"),
        ("http://localhost:port/v1", "cannot be read"),
        ("http://localhost:8000/v1?key=1", "goes on with ? or #"),
        ("http://no-such-host.invalid/v1", "no host has this name"),
        ("http://\x1b[31m/v1", ""),
    ],
)
def test_addresses_that_are_none(address: str, said: str) -> None:
    line = refusal(address)
    assert said in line
    assert "\x1b" not in line


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert f"{address}: nobody listens there" in refusal(address)
        (finding,) = json.loads(asked(address, "--json"))
    assert finding["state"] == "fails"
    assert "nobody listens there" in finding["detail"]


def test_https_where_http_is_spoken(root: str) -> None:
    assert "is it http:// instead of https://?" in refusal(f"{root.replace('http:', 'https:')}/v1")


def test_another_services_port(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = lambda handler: handler.connection.sendall(b"\x15\x03\x03\x00\x02\x02\x32")
    assert "does it want https://" in refusal(f"{root}/v1")


def test_redirects_in_a_circle(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = (307, {"location": "/v1/models"}, b"")
    assert "it redirects in a circle" in refusal(f"{root}/v1")


def test_a_proxy_may_be_to_blame(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"{root}/nowhere")
    monkeypatch.setenv("no_proxy", "localhost")
    said = "(asked through the proxy that http_proxy names"
    assert said in refusal("http://a-host.invalid/v1")
    assert said not in refusal("http://localhost:9/v1")


@pytest.mark.parametrize(
    ("body", "said"), [(HTML, "500: a web page"), (b"", "500: without a word"), (b"[1]", "500: [1]")]
)
def test_errors_in_other_forms(fake: Fake, root: str, body: bytes, said: str) -> None:
    fake.routes["/v1/models"] = (500, {}, body)
    assert f"answers HTTP {said}" in refusal(f"{root}/v1")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "lacks /v1 at its end: ROOT/v1"),
        ("/", "lacks /v1 at its end: ROOT/v1"),
        ("/v1/chat/completions", "leave /chat/completions out: ROOT/v1"),
        ("/v1/chat/completions/", "leave /chat/completions out: ROOT/v1"),
        ("/api/v1", "what stands before /v1, which is /api here, right?"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--model", "tiny")])
def test_where_the_address_is_wrong(root: str, path: str, said: str, options: tuple[str, ...]) -> None:
    line = refusal(root + path, *options)
    assert said.replace("ROOT", root) in line
    assert "HTTP 404" in line


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (None, "asks for a key: set OPENAI_API_KEY"),
        ("wrong", "refuses the key in OPENAI_API_KEY"),
        ("schlüssel", "OPENAI_API_KEY has characters that no header can carry"),
        ("key\n", "OPENAI_API_KEY has characters that no header can carry"),
    ],
)
def test_keys(fake: Fake, root: str, monkeypatch: pytest.MonkeyPatch, key: str | None, said: str) -> None:
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    fake.routes["/v1/models"] = error(401, "Unauthorized")
    line = refusal(f"{root}/v1")
    assert said in line
    assert key is None or key.strip() not in line


def test_a_password_stays_secret(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = error(500, "no")
    line = refusal(root.replace("http://", "http://me:secret@") + "/v1")
    assert f"{root}/v1 answers HTTP 500: no" in line
    assert "secret" not in line


def test_what_a_server_says_is_cut_and_cannot_steer_a_terminal(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = error(500, "\x1b]0;owned\x07[bold]red\n" + 100_000 * "long")
    line = refusal(f"{root}/v1")
    assert len(line) < 500
    assert "]0;owned" in line
    assert "[bold]red" in line
    assert line.isprintable()


def test_names_of_models_cannot_steer_a_terminal_either(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = body_of({"data": [{"id": "tiny\x1b[31m" + 9000 * "x"}]})
    output = asked(f"{root}/v1")
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) < 500


def test_another_model_is_not_said_to_be_served(root: str) -> None:
    output = asked(f"{root}/v1", "--model", "wrong")
    assert "works" not in output
    assert "it serves no model wrong, but: tiny" in output


def test_a_model_that_is_not_listed_may_be_served(fake: Fake, root: str) -> None:
    fake.routes["/v1/models"] = body_of({"data": [{"id": "other"}]})
    result = CliRunner().invoke(app, ["--base-url", f"{root}/v1", "--model", "tiny"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert "serves tiny, which its /models does not list" in result.output


def test_a_stock_server_lacks_the_field_and_nothing_else_is_blamed(fake: Fake, root: str) -> None:
    fake.reads_field = False
    output = asked(f"{root}/v1")
    assert "nobody reads the field" in output
    assert "as the field is not read, see above" in output
    assert "method, rate" not in output


def test_a_server_whose_method_is_off(fake: Fake, root: str) -> None:
    fake.facts = {**FACTS, "method": "off", "tokens_avg": 100}
    output = asked(f"{root}/v1")
    assert "the server's method is off, so that only requests that name one are pruned" in output
    assert "the server's method is off: no localizer is asked" in output
    assert "no localizer is set" not in output


def test_a_model_without_regions_is_asked_for_less_of_all(fake: Fake, root: str) -> None:
    fake.has_regions = False
    result = CliRunner().invoke(app, ["--base-url", f"{root}/v1"], env={"COLUMNS": "400"})
    assert re.search(r"works +max_tokens honoured +4 of 4 requests with max_tokens took fewer", result.output)
    assert result.exit_code == 0


def test_a_server_that_evicts_keeps_its_prompts(fake: Fake, root: str) -> None:
    fake.facts = {**FACTS, "method": "ilp"}
    result = CliRunner().invoke(app, ["--base-url", f"{root}/v1"], env={"COLUMNS": "400"})
    assert re.search(r"works +regions honoured +the server's method is ilp: prompts keep", result.output)
    assert result.exit_code == 0
    fake.facts = {**fake.facts, "tokens_avg": FACTS["tokens"]}  # and evicts nothing
    assert "0 of 4 requests with a region took fewer" in asked(f"{root}/v1")


def test_what_the_page_of_a_server_that_does_not_prune_says_is_passed_on(fake: Fake, root: str) -> None:
    fake.routes["/v1/plugins/crop/settings"] = error(501, "this server does not prune: start it with X")
    result = CliRunner().invoke(app, ["--base-url", f"{root}/v1"], env={"COLUMNS": "400"})
    assert "this server does not prune: start it with X" in result.output
    assert "VLLM_PLUGINS" not in result.output


def test_settings_are_not_judged_at_a_server() -> None:
    result = CliRunner().invoke(
        app, ["--base-url", "http://localhost:1/v1", "--crop-config", "{}"], env={"COLUMNS": "400"}
    )
    assert result.exit_code == 2
    assert "is not judged with --base-url" in result.output
