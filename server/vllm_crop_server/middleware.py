# SPDX-License-Identifier: Apache-2.0
"""Takes the body field `crop` off a request and puts the `x-crop-facts` header on its response.

vLLM adds `--middleware` classes outside its authentication. So nothing is read on the way in: the body is
looked at when the route itself reads it, which is after authentication, and stays as the client sent it
(vLLM's request models ignore fields they do not know).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_crop.crop_params import FACTS_HEADER, CropParams, InvalidCropError
from vllm_crop.frontend.metrics import crop_metrics
from vllm_crop.frontend.request_context import RequestContext, current_request, facts_header
from vllm_crop_server.body import FIELD, LONGEST_NAME, find_field, is_utf8, may_have_field
from vllm_crop_server.schemas import error_body

COUNT_ROUTE = "/count_tokens"  # of the messages API, which vLLM renders as if it were to be answered
BATCH_ROUTE = "/chat/completions/batch"
MAX_BODY_BYTES = 512 << 20
LARGE_BODY_BYTES = 1 << 20  # read beside the event loop
_SEEN = "vllm_crop.seen"


class CropMiddleware:
    """Pure ASGI middleware, for `vllm serve --middleware` (which `--plugin crop` adds)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, _warming_up(scope, send))
            return
        if scope["type"] != "http" or _SEEN in scope:
            await self.app(scope, receive, send)
            return
        scope[_SEEN] = True  # marked here and not by the context variable, which a pipelined request inherits
        exchange = _Exchange(scope, receive, send) if _is_json_post(scope) else None
        token = current_request.set(exchange.context if exchange else None)
        try:
            if exchange is None:
                await self.app(scope, receive, send)
            else:
                await exchange.run(self.app)
        finally:
            current_request.reset(token)


class _Exchange:
    """One request and its response: reads `crop` from the body as it passes, adds the facts, or rejects."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.context = RequestContext(
            in_batch=scope["path"].endswith(BATCH_ROUTE), only_counts=scope["path"].endswith(COUNT_ROUTE)
        )
        self.rejection: tuple[int, InvalidCropError] | None = None
        self.rejected = False
        self.status = 0
        self.answered = self.gone = False  # all was sent; the client went away before
        self.chunks: list[bytes] = []
        self.num_bytes = 0
        self.first_bytes = b""  # tell the encoding
        self.last_bytes = b""  # the field's name may lie across two chunks
        self.may_have_field = False
        self.complete = False

    async def run(self, app: ASGIApp) -> None:
        """Serve the request; whatever a route makes of a rejected body is replaced by the rejection."""
        try:
            await app(self.scope, self.pass_body, self.send_with_facts)
        except Exception:
            if self.rejection is None:
                raise
        finally:
            # Maybe refused or gone before it reached the engine.
            self.context.over(self.answered and not self.gone and self.status < 400)
        if self.rejection is not None:
            await self._reject()

    async def pass_body(self) -> Message:
        """The route's `receive`."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            self.gone = self.gone or not self.answered
        if message["type"] == "http.request" and not self.complete:
            chunk = message.get("body", b"")
            self.chunks.append(chunk)
            self.num_bytes += len(chunk)
            self.first_bytes = (self.first_bytes + chunk[:4])[:4]
            seen = self.last_bytes + chunk
            self.may_have_field = self.may_have_field or may_have_field(seen)
            self.last_bytes = seen[-LONGEST_NAME:]
            if self.num_bytes > MAX_BODY_BYTES:
                self._end_route(413, InvalidCropError("body", f"larger than {MAX_BODY_BYTES} bytes"))
            self.complete = not message.get("more_body", False)
            if self.complete:
                await self._read_crop()
        return message

    async def send_with_facts(self, message: Message) -> None:
        """The route's `send`."""
        if self.rejection is not None:
            await self._reject()
            return
        if message["type"] == "http.response.start" and message["status"] < 400:
            if self.context.params is not None and not self.context.handed_over:
                self.rejection = 400, InvalidCropError(FIELD, f"not possible on {self.scope['path']}")
                await self._reject()
                return
            self._report(message)
        await self.send(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.answered = not message.get("more_body", False)

    def _report(self, response_start: Message) -> None:
        context = self.context
        if context.facts:
            MutableHeaders(scope=response_start)[FACTS_HEADER] = facts_header(context.facts)
            if context.model_name is not None:
                crop_metrics().record(context.model_name, context.facts)

    async def _read_crop(self) -> None:
        chunks, self.chunks = self.chunks, []
        if not self.may_have_field and is_utf8(self.first_bytes):
            return
        body = b"".join(chunks)
        try:
            large = len(body) > LARGE_BODY_BYTES
            self.context.params = await asyncio.to_thread(read_crop, body) if large else read_crop(body)
            self._refuse_shared_lists()
        except InvalidCropError as error:
            self._end_route(400, error)

    def _refuse_shared_lists(self) -> None:
        params = self.context.params
        if params is None or not self.scope["path"].endswith(BATCH_ROUTE):
            return
        for name, value in (("regions", params.regions), ("max_tokens", params.max_tokens)):
            if isinstance(value, list | tuple):
                raise InvalidCropError(
                    f"crop.{name}",
                    f"this route answers several conversations, and {name} in a list belong to the images of "
                    "one: send them one by one",
                )

    def _end_route(self, status: int, error: InvalidCropError) -> NoReturn:
        self.rejection = status, error
        raise HTTPException(status, str(error)) from None

    async def _reject(self) -> None:
        if not self.rejected and self.rejection is not None:
            self.rejected = True
            status, error = self.rejection
            content = error_body(str(error), error.parameter, status, self.scope["path"])
            await JSONResponse(content, status_code=status)(self.scope, self.receive, self.send)


def read_crop(body: bytes) -> CropParams | None:
    """The validated `crop` field of a JSON body; None if there is none, or if the body is no JSON object.

    Raises:
        InvalidCropError: naming the wrong field.
    """
    value = find_field(body)
    return None if value is None else CropParams.parse(value)


def _warming_up(scope: Scope, send: Send) -> Send:
    """A `send` that lets the localizer answer once before the server says it has started."""
    state = getattr(scope.get("app"), "state", None)
    engine = getattr(state, "engine_client", None)
    found = getattr(getattr(engine, "renderer", None), "warm_up_localizer", None)
    if found is None:
        return send
    warm_up: Callable[[Any], Awaitable[None]] = found
    models = getattr(state, "openai_serving_models", None)

    async def send_when_warm(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            await warm_up(models)
        await send(message)

    return send_when_warm


def _is_json_post(scope: Scope) -> bool:
    if scope["method"] != "POST":
        return False
    media_type = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")
