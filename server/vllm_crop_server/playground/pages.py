# SPDX-License-Identifier: Apache-2.0
"""Serves the playground's files: static, from this package, with headers that let nothing else in."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PAGE_PATH = "/plugins/crop"
STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again, so that page and server are of one version
}


class Pages(StaticFiles):
    """The files of the page."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """As upstream, with our headers."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


async def access(request: Request) -> JSONResponse:
    """GET: whether this server asks for a key, so that the page need not find out by being refused."""
    return JSONResponse({"key_needed": request.app.state.crop_key_needed}, headers=HEADERS)
