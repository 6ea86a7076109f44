# SPDX-License-Identifier: Apache-2.0
"""The routes behind the playground. They lie under `/v1`, which vLLM's `--api-key` guards."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from vllm_crop.crop_params import InvalidCropError
from vllm_crop_server.playground.plans import Page, PlanRequest
from vllm_crop_server.schemas import error_body

PLAN_PATH = "/v1/plugins/crop/plan"
SETTINGS_PATH = "/v1/plugins/crop/settings"
MAX_BODY_BYTES = 256 << 10


async def plan(request: Request) -> JSONResponse:
    """POST: the TokenPlan of an image size, region, pruning rate and method."""
    page = request.app.state.crop_page
    if not isinstance(page, Page):
        return _error(request, 501, page)
    try:
        asked = PlanRequest.parse(await _read_body(request))
        # A large image has tens of thousands of tokens: too many to plan between two streamed answers.
        return JSONResponse(await run_in_threadpool(page.plan, asked))
    except InvalidCropError as error:
        return _error(request, 400, str(error), error.parameter)


async def settings(request: Request) -> JSONResponse:
    """GET: the methods, rates and localizer of this server."""
    page = request.app.state.crop_page
    if not isinstance(page, Page):
        return _error(request, 501, page)
    return JSONResponse(page.settings())


async def _read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise InvalidCropError("body", f"larger than {MAX_BODY_BYTES} bytes")
    return body


def _error(request: Request, status: int, message: str, field: str = "model") -> JSONResponse:
    content = error_body(message, field, status, request.url.path)
    return JSONResponse(content, status_code=status)
