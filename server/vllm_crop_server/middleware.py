# SPDX-License-Identifier: Apache-2.0
"""Takes the body field `crop` off a request and puts the `x-crop-facts` header on its response.

vLLM adds `--middleware` classes outside its authentication. So nothing is read on the way in: the body is
looked at when the route itself reads it, which is after authentication, and stays as the client sent it
(vLLM's request models ignore fields they do not know).
"""

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_crop.facts import facts_header
from vllm_crop.params import CropParams, InvalidCropError
from vllm_crop.request_context import RequestContext, current_request
from vllm_crop_server.schemas import error_body

FIELD = "crop"
FACTS_HEADER = "x-crop-facts"
MAX_BODY_BYTES = 512 << 20


class CropMiddleware:
    """Pure ASGI middleware, for `vllm serve --middleware` (which `--plugin crop` adds)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_json_post(scope) or current_request.get() is not None:
            await self.app(scope, receive, send)
            return
        context = RequestContext()
        token = current_request.set(context)
        try:
            body_reader = _BodyReader(receive, context)
            await self.app(scope, body_reader, _response_sender(scope, send, context, body_reader))
        finally:
            current_request.reset(token)


class _BodyReader:
    """The route's `receive`: passes the body through and reads `crop` from it when it is complete."""

    def __init__(self, receive: Receive, context: RequestContext) -> None:
        self.receive = receive
        self.context = context
        self.chunks: list[bytes] = []
        self.num_bytes = 0
        self.complete = False
        self.rejection: InvalidCropError | None = None

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request" and not self.complete:
            chunk = message.get("body", b"")
            self.chunks.append(chunk)
            self.num_bytes += len(chunk)
            if self.num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"request body larger than {MAX_BODY_BYTES} bytes")
            self.complete = not message.get("more_body", False)
            if self.complete:
                self._finish()
        return message

    def _finish(self) -> None:
        body = b"".join(self.chunks)
        self.chunks.clear()
        try:
            self.context.params = read_crop(body)
        except InvalidCropError as error:
            self.rejection = error
            # Ends the route; what it answers is replaced by the rejection.
            raise HTTPException(400, str(error)) from None


def read_crop(body: bytes) -> CropParams | None:
    """The validated `crop` field of a JSON body; None if there is none, or if the body is no JSON object.

    Raises:
        InvalidCropError: naming the wrong field.
    """
    # A key can also be spelled with escapes; anything else cannot contain the field.
    if b'"crop"' not in body and b"\\u" not in body:
        return None
    try:
        request = json.loads(body)
    except RecursionError:
        raise InvalidCropError(f"{FIELD}: the request body is nested too deeply") from None
    except ValueError:
        return None  # the route answers bodies that are not JSON
    value = request.get(FIELD) if isinstance(request, dict) else None
    return None if value is None else CropParams.parse(value)


def _is_json_post(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    media_type = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def _response_sender(scope: Scope, send: Send, context: RequestContext, body_reader: _BodyReader) -> Send:
    rejected = False

    async def send_with_facts(message: Message) -> None:
        nonlocal rejected
        if body_reader.rejection is not None:
            if not rejected:
                rejected = True
                content = error_body(body_reader.rejection, scope["path"])
                await JSONResponse(content, status_code=400)(scope, body_reader.receive, send)
            return
        if message["type"] == "http.response.start" and context.facts:
            MutableHeaders(scope=message)[FACTS_HEADER] = facts_header(context.facts)
        await send(message)

    return send_with_facts
