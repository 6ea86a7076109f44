# SPDX-License-Identifier: Apache-2.0
"""The middleware around the smallest apps that show one behaviour each."""

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket
from vllm_crop_server.middleware import FACTS_HEADER, CropMiddleware, read_crop

from vllm_crop.crop_params import CropParams, InvalidCropError
from vllm_crop.frontend.request_context import MAX_HEADER_BYTES, ImageFacts, RequestContext, current_request
from vllm_crop.planning.geometry import Box, Region

PATH = "/v1/chat/completions"
JSON_TYPE = {"content-type": "application/json"}
BOX = [0.1, 0.2, 0.3, 0.4]
REGION = Region((Box(0.1, 0.2, 0.3, 0.4),))
FACTS = ImageFacts(576, 128, 128.0, REGION, "request")


def current_params() -> CropParams | None:
    """What the middleware has handed on to the code that serves the request."""
    context = current_request.get()
    return None if context is None else context.params


def as_json(params: CropParams | None) -> Any:
    """Parsed params as they can be compared with what was sent."""
    if params is None:
        return None
    regions = None
    if params.regions is not None:
        regions = [None if region is None else region.as_lists() for region in params.regions]
    return {"regions": regions, "pruning_rate": params.pruning_rate, "method": params.method}


class TakesNotice:
    """Stands where vLLM's renderer does: whatever lies inside may use the request's params."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if (context := current_request.get()) is not None:
            context.handed_over = True
        await self.app(scope, receive, send)


async def echo(request: Request) -> Response:
    """Answers with the body as it arrived; the params go into a header."""
    body = await request.body()
    return Response(body, headers={"x-params": json.dumps(as_json(current_params()))})


def app_with(
    endpoint: Callable[..., Any] = echo, *inner: Middleware, path: str = PATH, times: int = 1
) -> Starlette:
    """One route behind the middleware; `inner` lies between the two, as vLLM's authentication does."""
    return Starlette(
        routes=[Route(path, endpoint, methods=["GET", "POST"])],
        middleware=[*[Middleware(CropMiddleware)] * times, *inner, Middleware(TakesNotice)],
    )


def client_of(app: ASGIApp) -> TestClient:
    """A client that gets HTTP 500 as an answer, as over a network."""
    return TestClient(app, raise_server_exceptions=False)


def post(body: str | bytes, app: ASGIApp | None = None, path: str = PATH, **headers: str) -> Any:
    """Send a body to the echo app, or another, as JSON unless a header says otherwise."""
    given_headers = {**JSON_TYPE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return client_of(app or app_with(path=path)).post(path, content=body, headers=given_headers)


def params_of(response: Any) -> Any:
    """The params that the echo app saw."""
    assert response.status_code == 200, response.text
    return json.loads(response.headers["x-params"])


@dataclass
class Exchange:
    """One request driven through an app by hand, message by message."""

    chunks: Sequence[bytes] = ()
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON_TYPE))
    sent: list[Message] = field(default_factory=list)
    num_received: int = 0

    async def run(self, app: ASGIApp) -> "Exchange":
        """Let the app serve the request."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()],
        }
        await app(scope, self._receive, self._send)
        return self

    @property
    def status(self) -> int:
        """The status of the one response there must be."""
        starts = [message["status"] for message in self.sent if message["type"] == "http.response.start"]
        assert len(starts) == 1
        return int(starts[0])

    @property
    def body(self) -> bytes:
        """The whole body of the response."""
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> Message:
        if self.num_received == len(self.chunks):
            return {"type": "http.disconnect"}
        chunk = self.chunks[self.num_received]
        self.num_received += 1
        return {"type": "http.request", "body": chunk, "more_body": self.num_received < len(self.chunks)}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


# The body.


@pytest.mark.parametrize(
    "body",
    [
        b'{"crop": {"pruning_rate": 0.5}}',
        b'  {"model" : "m",\n "crop":{"regions":[null]}, "messages":[]}\r\n',
        b'{"messages": [{"role": "user", "content": "\xc3\xa9\xf0\x9f\x98\x80 \\u00e9"}]}',
        b'{"crop": null}',
        b"{}",
        b"[]",
        b"",
    ],
)
def test_the_body_reaches_the_route_as_it_was_sent(body: bytes) -> None:
    response = post(body)
    assert response.status_code == 200
    assert response.content == body


def test_crop_is_parsed_and_handed_on() -> None:
    crop = {"regions": [None, BOX, [BOX, [0, 0, 1, 1]]], "pruning_rate": 0.5, "method": "plc"}
    assert params_of(post(json.dumps({"model": "m", "crop": crop}))) == {
        "regions": [None, [BOX], [BOX, [0.0, 0.0, 1.0, 1.0]]],
        "pruning_rate": 0.5,
        "method": "plc",
    }


@pytest.mark.parametrize(
    "key",
    ['"crop"', r'"\u0063rop"', r'"cro\u0070"', r'"\u0063\u0072\u006f\u0070"', r'"\u0063\u0072\u006F\u0070"'],
)
def test_the_key_may_be_spelled_with_escapes(key: str) -> None:
    assert params_of(post(f'{{{key}: {{"pruning_rate": 0.25}}}}'))["pruning_rate"] == 0.25


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        '{"crop": null}',
        r'{"\u0063rop": null}',
        '{"messages": [{"content": "crop"}]}',
        '{"messages": [{"crop": {"pruning_rate": 7}}]}',
        r'{"text": "\"crop\": {\"pruning_rate\": 7}"}',
        '{"Crop": {"pruning_rate": 7}}',
        '[{"crop": {"pruning_rate": 7}}]',
        '"crop"',
    ],
)
def test_bodies_without_the_field_set_nothing(body: str) -> None:
    assert params_of(post(body)) is None


def test_an_empty_crop_is_not_an_absent_one() -> None:
    assert params_of(post('{"crop": {}}')) == {"regions": None, "pruning_rate": None, "method": None}


def test_the_last_of_several_crop_fields_counts_as_in_the_route() -> None:
    assert (
        params_of(post('{"crop": {"pruning_rate": 0.1}, "crop": {"pruning_rate": 0.2}}'))["pruning_rate"]
        == 0.2
    )
    assert params_of(post('{"crop": {"pruning_rate": 7}, "crop": null}')) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"crop": ',
        b'{"crop": {"pruning_rate": 0.5}',
        b"crop=1",
        b'"crop" is no JSON',
        b'{"crop": \xff\xfe}',
        b"\\u",
    ],
)
def test_bodies_that_are_no_json_are_left_to_the_route(body: bytes) -> None:
    response = post(body)
    assert params_of(response) is None
    assert response.content == body


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_crop_is_found_in_every_encoding_the_route_reads(encoding: str) -> None:
    async def parse(request: Request) -> Response:
        assert (await request.json())["crop"] == {"pruning_rate": 0.5}
        return JSONResponse(as_json(current_params()))

    response = post('{"crop": {"pruning_rate": 0.5}}'.encode(encoding), app_with(parse))
    assert response.json()["pruning_rate"] == 0.5


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_chunked_bodies_are_put_together(size: int) -> None:
    body = json.dumps({"pad": "é" * 30, "crop": {"regions": [BOX], "pruning_rate": 0.5}}).encode()
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    done = asyncio.run(Exchange([*chunks, b""]).run(app_with()))
    assert (done.status, done.body) == (200, body)
    headers = {name.decode(): value.decode() for name, value in done.sent[0]["headers"]}
    assert json.loads(headers["x-params"])["pruning_rate"] == 0.5


def test_chunks_are_passed_on_one_by_one_not_gathered() -> None:
    seen: list[tuple[bytes, CropParams | None]] = []

    async def stream(request: Request) -> Response:
        async for chunk in request.stream():
            seen.append((chunk, current_params()))
        return Response()

    chunks = [b'{"crop": ', b'{"pruning_rate": 0.5}', b"}"]
    asyncio.run(Exchange(chunks).run(app_with(stream)))
    params = CropParams(pruning_rate=0.5)
    assert seen[:3] == [(chunks[0], None), (chunks[1], None), (chunks[2], params)]


def test_a_client_that_leaves_in_the_middle_sets_nothing() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"], current_params()])

    async def receive(messages: Iterator[Message]) -> Message:
        return next(messages)

    body: Message = {"type": "http.request", "body": b'{"crop": {"pruning_rate": 7}}', "more_body": True}
    messages: Iterator[Message] = iter([body, {"type": "http.disconnect"}])
    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "headers": [(b"content-type", b"application/json")],
    }

    async def unused(message: Message) -> None: ...

    asyncio.run(CropMiddleware(app)(scope, lambda: receive(messages), unused))
    assert seen == ["http.request", "http.disconnect", None]


def test_a_route_that_does_not_read_the_body_is_served() -> None:
    async def ignore(request: Request) -> Response:
        return Response("done")

    assert post('{"crop": 7}', app_with(ignore)).text == "done"


# Which requests are looked at.


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "application/json ;a=b",
        "application/vnd.api+json",
    ],
)
def test_json_posts_are_looked_at(content_type: str) -> None:
    assert (
        params_of(post('{"crop": {"pruning_rate": 0.5}}', content_type=content_type))["pruning_rate"] == 0.5
    )


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data; boundary=x", "application/jsonl", ""]
)
def test_other_posts_are_not(content_type: str) -> None:
    response = post('{"crop": {"pruning_rate": 7}}', content_type=content_type)
    assert params_of(response) is None
    assert response.text == '{"crop": {"pruning_rate": 7}}'


def test_get_requests_pass_with_receive_and_send_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([receive, send, current_request.get()])

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None: ...

    for scope in (
        {"type": "http", "method": "GET", "headers": []},
        {"type": "lifespan"},
        {"type": "websocket"},
    ):
        seen.clear()
        asyncio.run(CropMiddleware(app)(scope, receive, send))
        assert seen == [receive, send, None]


def test_lifespan_and_websockets_work_behind_the_middleware() -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/ws", talk)], middleware=[Middleware(CropMiddleware)])
    with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
        websocket.send_text('{"crop": 7}')
        assert websocket.receive_text() == '{"crop": 7}'


# Wrong requests.

# The text of the crop field as sent, and the field that the answer must name.
MALFORMED = [
    ("7", "crop"),
    ("0.5", "crop"),
    ("true", "crop"),
    ("false", "crop"),
    ('"off"', "crop"),
    ('""', "crop"),
    ("[]", "crop"),
    ("[{}]", "crop"),
    ("NaN", "crop"),
    (r'{"\ud800": 1}', "crop"),
    ('{"rate": 0.5}', "crop.rate"),
    ('{"region": [0, 0, 1, 1]}', "crop.region"),
    ('{"pruning_rate": 0.5, "extra": null}', "crop.extra"),
    ('{"pruning_rate": 1}', "crop.pruning_rate"),
    ('{"pruning_rate": 1.0}', "crop.pruning_rate"),
    ('{"pruning_rate": 0.99999999999999999999}', "crop.pruning_rate"),
    ('{"pruning_rate": -1e-300}', "crop.pruning_rate"),
    ('{"pruning_rate": NaN}', "crop.pruning_rate"),
    ('{"pruning_rate": Infinity}', "crop.pruning_rate"),
    ('{"pruning_rate": -Infinity}', "crop.pruning_rate"),
    ('{"pruning_rate": 1e999}', "crop.pruning_rate"),
    (f'{{"pruning_rate": 1{"0" * 400}}}', "crop.pruning_rate"),
    ('{"pruning_rate": "0.5"}', "crop.pruning_rate"),
    ('{"pruning_rate": true}', "crop.pruning_rate"),
    ('{"pruning_rate": [0.5]}', "crop.pruning_rate"),
    ('{"pruning_rate": {"a": 1}}', "crop.pruning_rate"),
    ('{"method": "plc,ilp"}', "crop.method"),
    ('{"method": "PLC"}', "crop.method"),
    ('{"method": ""}', "crop.method"),
    ('{"method": 0}', "crop.method"),
    (r'{"method": "\ud83d"}', "crop.method"),
    ('{"regions": {}}', "crop.regions"),
    ('{"regions": "whole"}', "crop.regions"),
    ('{"regions": 0}', "crop.regions"),
    ('{"regions": [0, 0, 1, 1]}', "crop.regions"),
    ('{"regions": [[]]}', "crop.regions"),
    ('{"regions": [[[]]]}', "crop.regions"),
    ('{"regions": [[0, 0, 1]]}', "crop.regions"),
    ('{"regions": [[0, 0, 1, 1, 1]]}', "crop.regions"),
    ('{"regions": [[0, 0, 1, 2]]}', "crop.regions"),
    ('{"regions": [[-0.01, 0, 1, 1]]}', "crop.regions"),
    ('{"regions": [[0, 0, NaN, 1]]}', "crop.regions"),
    ('{"regions": [[0, 0, 1e999, 1]]}', "crop.regions"),
    ('{"regions": [["0", "0", "1", "1"]]}', "crop.regions"),
    ('{"regions": [[0, 0, true, 1]]}', "crop.regions"),
    ('{"regions": [[0, 0, null, 1]]}', "crop.regions"),
    ('{"regions": [[0.5, 0, 0.5, 1]]}', "crop.regions"),
    ('{"regions": [[0, 0.9, 1, 0.1]]}', "crop.regions"),
    ('{"regions": [[[0, 0, 1, 1], null]]}', "crop.regions"),
    ('{"regions": [{"x0": 0, "y0": 0, "x1": 1, "y1": 1}]}', "crop.regions"),
    ('{"regions": [false]}', "crop.regions"),
    (f'{{"regions": [{"null," * 5000}null]}}', "crop.regions"),
    (f'{{"regions": [[{"[0,0,1,1]," * 5000}[0,0,1,1]]]}}', "crop.regions"),
    (f'{{"regions": [{"[" * 300}{"]" * 300}]}}', "crop.regions"),
    (f'{{"regions": {"[" * 100_000}{"]" * 100_000}}}', "crop"),
]
IDS = [f"{index}-{text[:40]}" for index, (text, _) in enumerate(MALFORMED)]


@pytest.mark.parametrize(("text", "parameter"), MALFORMED, ids=IDS)
def test_a_malformed_crop_is_a_400_that_names_the_field(text: str, parameter: str) -> None:
    response = post(f'{{"model": "m", "crop": {text}}}')
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["param"] == parameter
    assert error["message"].startswith(parameter)
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert len(response.content) < 1000


class ChatRequest(BaseModel):
    """A request model that ignores fields it does not know, as vLLM's do."""

    model: str


def fastapi_app(*inner: Middleware) -> FastAPI:
    """A route with a validated body, as vLLM's are."""
    app = FastAPI(middleware=[Middleware(CropMiddleware), *inner, Middleware(TakesNotice)])

    @app.post(PATH)
    async def chat(request: ChatRequest) -> dict[str, Any]:
        return {"model": request.model, "params": as_json(current_params())}

    return app


@pytest.mark.parametrize(("text", "parameter"), MALFORMED[::6], ids=IDS[::6])
def test_routes_with_validated_bodies_answer_the_same(text: str, parameter: str) -> None:
    response = post(f'{{"model": "m", "crop": {text}}}', fastapi_app())
    assert (response.status_code, response.json()["error"]["param"]) == (400, parameter)


def test_routes_with_validated_bodies_see_crop_and_their_own_errors_stay() -> None:
    app = fastapi_app()
    served = post('{"model": "m", "crop": {"pruning_rate": 0.5}}', app)
    assert served.json()["params"]["pruning_rate"] == 0.5
    assert post('{"crop": {"pruning_rate": 0.5}}', app).status_code == 422
    assert post('{"model": "m", "crop": ', app).status_code == 422


def test_the_server_lives_on_after_a_malformed_crop() -> None:
    client = client_of(app_with())
    assert client.post(PATH, content='{"crop": 7}', headers=JSON_TYPE).status_code == 400
    after = client.post(PATH, content='{"crop": {"pruning_rate": 0.5}}', headers=JSON_TYPE)
    assert params_of(after)["pruning_rate"] == 0.5
    assert params_of(client.post(PATH, content="{}", headers=JSON_TYPE)) is None


def test_a_route_that_hides_errors_of_the_body_cannot_hide_the_rejection() -> None:
    async def swallow(request: Request) -> Response:
        try:
            await request.body()
        except Exception:
            return Response("served all the same", headers={"x-secret": "1"})
        raise AssertionError("the body is wrong")

    response = post('{"crop": 7}', app_with(swallow))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "crop"
    assert "x-secret" not in response.headers


def test_a_rejection_is_one_response_however_many_messages_the_route_sends() -> None:
    async def stream_an_error(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with pytest.raises(HTTPException):
            await request.body()
        response = StreamingResponse(iter(["a", "b", "c"]), status_code=500)
        await response(scope, receive, send)

    done = asyncio.run(Exchange([b'{"crop":', b" 7}"]).run(CropMiddleware(stream_an_error)))
    assert done.status == 400
    assert json.loads(done.body)["error"]["param"] == "crop"
    assert [message["type"] for message in done.sent] == ["http.response.start", "http.response.body"]


def test_messages_are_refused_in_the_words_of_their_api() -> None:
    response = post('{"crop": {"method": "fast"}}', path="/v1/messages")
    assert response.status_code == 400
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith("crop.method: ")


def test_a_field_nested_too_deeply_is_a_400() -> None:
    nested = "[" * 100_000 + "]" * 100_000
    response = post(f'{{"crop": {{"regions": {nested}}}}}')
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("crop: nested too deeply")


def test_what_lies_beside_the_field_is_not_parsed() -> None:
    nested = "[" * 100_000 + "]" * 100_000
    response = post(f'{{"crop": {{"method": "plc"}}, "messages": {nested}}}')
    assert params_of(response) == {"regions": None, "pruning_rate": None, "method": "plc"}


def test_a_deeply_nested_body_without_crop_is_left_to_the_route() -> None:
    nested = "[" * 100_000 + "]" * 100_000
    assert post(nested).text == nested


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("plc"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["regions", "pruning_rate", "method"]) | st.text(max_size=4), inner)
    ),
    max_leaves=12,
)


def refusal_of(body: bytes) -> InvalidCropError | None:
    """Why a body is refused, if it is."""
    try:
        read_crop(body)
    except InvalidCropError as error:
        return error
    return None


@given(json_values)
def test_any_value_is_either_parsed_or_refused_by_name(value: Any) -> None:
    body = json.dumps({"crop": value}).encode()
    refusal = refusal_of(body)
    if refusal is None:
        assert (read_crop(body) is None) == (value is None)
    else:
        assert refusal.parameter.split(".")[0] == "crop"
        assert str(refusal).startswith("crop")
        str(refusal).encode()


@given(st.binary(max_size=40), st.sampled_from([b'"crop"', b"\\u", b'{"crop":']))
def test_any_bytes_are_read_without_an_unexpected_error(noise: bytes, marker: bytes) -> None:
    for body in (noise, marker + noise, noise + marker):
        refusal = refusal_of(body)
        assert refusal is None or refusal.parameter.startswith("crop")


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_a_body_beyond_the_cap_is_refused_as_soon_as_it_is(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"crop": {"pruning_rate": 0.5}, "pad": "' + b"x" * 60 + b'"}'
    chunks = [body[start : start + chunk_size] for start in range(0, len(body), chunk_size)]
    monkeypatch.setattr("vllm_crop_server.middleware.MAX_BODY_BYTES", len(body))
    assert asyncio.run(Exchange(chunks).run(app_with())).status == 200

    monkeypatch.setattr("vllm_crop_server.middleware.MAX_BODY_BYTES", 20)
    refused = asyncio.run(Exchange(chunks).run(app_with()))
    assert refused.status == 413
    assert b"20 bytes" in refused.body
    assert refused.num_received == min(20 // chunk_size + 1, len(chunks))


# Facts.


def facts_app(
    facts: Sequence[ImageFacts], *inner: Middleware, times: int = 1, stream: bool = False
) -> Starlette:
    """A route that serves images with these facts."""

    async def serve(request: Request) -> Response:
        await request.body()
        context = current_request.get()
        assert context is not None
        context.facts.extend(facts)
        if not stream:
            return JSONResponse({"choices": []})

        async def events() -> AsyncIterator[str]:
            for index in range(3):
                await asyncio.sleep(0)
                yield f"data: {index}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app_with(serve, *inner, times=times)


def test_facts_are_in_the_header_of_the_response() -> None:
    response = post("{}", facts_app([FACTS]))
    assert response.json() == {"choices": []}
    told = json.loads(response.headers[FACTS_HEADER])
    assert (told["tokens"], told["tokens_after_plc"]) == (576, 128)
    assert told["images"][0]["region"] == [BOX]


def test_facts_are_in_the_header_of_a_streaming_response() -> None:
    response = post("{}", facts_app([FACTS, FACTS], stream=True))
    assert response.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert json.loads(response.headers[FACTS_HEADER])["tokens"] == 1152


def test_streams_are_passed_on_chunk_by_chunk() -> None:
    done = asyncio.run(Exchange([b"{}"]).run(facts_app([FACTS], stream=True)))
    bodies = [message["body"] for message in done.sent if message["type"] == "http.response.body"]
    assert bodies == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n", b""]


def test_requests_without_images_get_no_header() -> None:
    response = post('{"crop": {}}', facts_app([]))
    assert response.status_code == 200
    assert FACTS_HEADER not in response.headers


def test_the_header_never_exceeds_its_cap() -> None:
    region = Region((Box(0.123456789, 0.1, 0.987654321, 0.9),) * 16)
    response = post("{}", facts_app([ImageFacts(576, 128, 128.0, region, "request")] * 300))
    header = response.headers[FACTS_HEADER]
    assert len(header) <= MAX_HEADER_BYTES
    assert json.loads(header)["num_images"] == 300


async def unchanged(request: Request, call_next: Callable[[Request], Any]) -> Any:
    """A middleware function, which runs the route in another task."""
    return await call_next(request)


TASK_OF_ITS_OWN = Middleware(BaseHTTPMiddleware, dispatch=unchanged)


def test_facts_come_through_middleware_that_runs_the_route_in_another_task() -> None:
    assert FACTS_HEADER in post('{"crop": {}}', facts_app([FACTS], TASK_OF_ITS_OWN)).headers


def test_validated_routes_in_another_task_name_the_field() -> None:
    app = fastapi_app(TASK_OF_ITS_OWN)
    assert post('{"model": "m", "crop": {"pruning_rate": 0.5}}', app).json()["params"]["pruning_rate"] == 0.5
    response = post('{"model": "m", "crop": 7}', app)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "crop")


def test_plain_routes_in_another_task_name_the_field() -> None:
    response = post('{"crop": 7}', app_with(echo, TASK_OF_ITS_OWN))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "crop")


def test_middleware_that_reads_the_body_before_the_route_does_not_hide_the_rejection() -> None:
    class ReadsAhead:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            message = await receive()

            async def replay() -> Message:
                return message

            await self.app(scope, replay, send)

    assert params_of(post('{"crop": {}}', app_with(echo, Middleware(ReadsAhead)))) is not None
    response = post('{"crop": 7}', app_with(echo, Middleware(ReadsAhead)))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "crop")


# Authentication, installation, concurrency.


class Authentication:
    """Pure ASGI, like vLLM's: answers 401 without reading the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (b"authorization", b"Bearer key") in scope["headers"]:
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)


def test_a_request_without_the_key_is_refused_before_anything_is_read() -> None:
    app = app_with(echo, Middleware(Authentication))
    refused = asyncio.run(Exchange([b'{"crop": 7}']).run(app))
    assert (refused.status, refused.num_received) == (401, 0)
    assert json.loads(refused.body) == {"error": "Unauthorized"}


def test_a_request_with_the_key_is_read_and_parsed() -> None:
    app = app_with(echo, Middleware(Authentication))
    assert post('{"crop": 7}', app, authorization="Bearer key").status_code == 400
    served = post('{"crop": {"pruning_rate": 0.5}}', app, authorization="Bearer key")
    assert params_of(served)["pruning_rate"] == 0.5


def test_being_installed_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []

    def counting_read_crop(body: bytes) -> CropParams | None:
        read.append(body)
        return read_crop(body)

    monkeypatch.setattr("vllm_crop_server.middleware.read_crop", counting_read_crop)
    body = '{"crop": {"pruning_rate": 0.5}}'
    assert params_of(post(body, app_with(times=2)))["pruning_rate"] == 0.5
    assert read == [body.encode()]
    refused = [post('{"crop": 7}', app_with(times=times)) for times in (1, 2)]
    assert refused[0].status_code == refused[1].status_code == 400
    assert refused[0].json() == refused[1].json()
    assert len(post("{}", facts_app([FACTS], times=2)).headers.get_list(FACTS_HEADER)) == 1


def test_nothing_is_left_behind_after_a_request() -> None:
    async def serve_all() -> list[RequestContext | None]:
        left = []
        for body in (b'{"crop": {"pruning_rate": 0.5}}', b'{"crop": 7}', b"{}"):
            await Exchange([body]).run(app_with())
            left.append(current_request.get())
        return left

    assert asyncio.run(serve_all()) == [None, None, None]


def test_nothing_is_left_behind_after_a_route_that_fails() -> None:
    async def fail(request: Request) -> Response:
        await request.body()
        raise RuntimeError("a bug in the route")

    async def serve() -> RequestContext | None:
        with pytest.raises(RuntimeError, match="a bug in the route"):
            await Exchange([b'{"crop": {}}']).run(app_with(fail))
        return current_request.get()

    assert asyncio.run(serve()) is None


def test_concurrent_requests_do_not_see_each_other() -> None:
    rates = [number / 20 for number in range(20)]
    everyone_has_read = asyncio.Barrier(len(rates))

    async def wait_for_all(request: Request) -> Response:
        body = await request.json()
        await everyone_has_read.wait()
        context = current_request.get()
        assert context is not None
        assert context.params is not None
        tokens = round(1000 * body["crop"]["pruning_rate"])
        context.facts.append(ImageFacts(1000, tokens, float(tokens), None, "request"))
        await asyncio.sleep(0)
        return JSONResponse(context.params.pruning_rate)

    async def serve_all() -> list[Exchange]:
        app = app_with(wait_for_all)
        exchanges = [Exchange([json.dumps({"crop": {"pruning_rate": rate}}).encode()]) for rate in rates]
        return await asyncio.gather(*(exchange.run(app) for exchange in exchanges))

    for rate, done in zip(rates, asyncio.run(serve_all()), strict=True):
        assert json.loads(done.body) == rate
        headers = {name.decode(): value.decode() for name, value in done.sent[0]["headers"]}
        told = json.loads(headers[FACTS_HEADER])
        assert (told["tokens_after_plc"], len(told["images"])) == (round(1000 * rate), 1)


@pytest.mark.parametrize("body", ['{"crop": {"pruning_rate": 0.5}}', "{}", '{"crop": 7}'])
def test_a_request_started_in_the_context_of_another_is_served_as_its_own(body: str) -> None:
    # Servers start a pipelined request, and after flow control every later request of a connection, in a
    # copy of the context of the request before (https://github.com/python/cpython/issues/140947).
    context = contextvars.copy_context()
    earlier = RequestContext(params=CropParams(pruning_rate=0.1), facts=[FACTS])
    context.run(current_request.set, earlier)
    chunks = [body.encode()]
    done = context.run(lambda: asyncio.run(Exchange(chunks).run(app_with())))
    alone = asyncio.run(Exchange(chunks).run(app_with()))
    assert (done.sent, earlier.facts) == (alone.sent, [FACTS])


def test_a_request_that_is_not_looked_at_does_not_see_the_crop_of_another() -> None:
    context = contextvars.copy_context()
    context.run(current_request.set, RequestContext(params=CropParams(pruning_rate=0.1)))
    plain_text = Exchange([b"{}"], headers={"content-type": "text/plain"})
    done = context.run(lambda: asyncio.run(plain_text.run(app_with())))
    assert (b"x-params", b"null") in done.sent[0]["headers"]


def route_without_renderer(status: int = 200, facts: Sequence[ImageFacts] = ()) -> Starlette:
    """A route of vLLM that reads its body and renders nothing, unless there are facts."""

    async def answer(request: Request) -> Response:
        await request.body()
        context = current_request.get()
        assert context is not None
        context.handed_over = bool(facts)
        context.facts.extend(facts)
        context.model_name = "middleware-test"
        return Response("{}", status_code=status, media_type="application/json")

    routes = [Route(PATH, answer, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(CropMiddleware)])


def test_a_route_that_takes_no_notice_of_crop_is_a_400() -> None:
    refused = post('{"crop": {"pruning_rate": 0.5}}', route_without_renderer())
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == f"crop: not possible on {PATH}"
    assert post("{}", route_without_renderer()).status_code == 200
    assert post('{"crop": {}}', route_without_renderer(status=422)).status_code == 422  # its own error stays


def served_images() -> float:
    labels = {"model_name": "middleware-test", "source": "request"}
    return REGISTRY.get_sample_value("crop:images_total", labels) or 0.0


def test_only_answered_requests_are_counted_and_reported() -> None:
    before = served_images()
    refused = post("{}", route_without_renderer(status=400, facts=[FACTS]))
    assert "x-crop-facts" not in refused.headers
    assert served_images() == before
    answered = post("{}", route_without_renderer(facts=[FACTS]))
    assert json.loads(answered.headers["x-crop-facts"])["tokens_after_plc"] == 128
    assert served_images() == before + 1


def test_regions_for_a_batch_of_conversations_are_refused() -> None:
    path = "/v1/chat/completions/batch"
    refused = post('{"crop": {"regions": [[0, 0, 1, 1]]}}', path=path)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "crop.regions"
    refused = post('{"crop": {"max_tokens": [64]}}', path=path)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "crop.max_tokens"
    for crop in ('{"pruning_rate": 0.5}', '{"max_tokens": 64}'):
        assert post(f'{{"crop": {crop}}}', path=path).status_code == 200


@pytest.mark.parametrize(
    ("status", "before", "bodies", "answered"),
    [
        (200, (), (False,), True),
        (200, (), (True, True, False), True),
        (200, (), (True,), False),  # a stream that was broken off
        (400, (), (False,), False),
        (200, ("http.disconnect",), (False,), False),  # the route answers somebody who has gone
    ],
)
def test_who_waits_for_the_end_of_a_request_learns_whether_it_was_answered(
    status: int, before: tuple[str, ...], bodies: tuple[bool, ...], answered: bool
) -> None:
    told: list[bool] = []

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        context = current_request.get()
        assert context is not None
        context.afterwards.append(told.append)
        await receive()
        for kind in before:
            assert (await receive())["type"] == kind
        await send({"type": "http.response.start", "status": status, "headers": []})
        for more in bodies:
            await send({"type": "http.response.body", "body": b"x", "more_body": more})
        assert not told
        if before == () and not bodies[-1]:
            await receive()  # a server says so once all is sent, too

    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        return None

    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(CropMiddleware(route)(scope, receive, send))
    assert told == [answered]
