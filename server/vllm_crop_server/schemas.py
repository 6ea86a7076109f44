# SPDX-License-Identifier: Apache-2.0
"""Errors in the JSON that clients of each API of vLLM's expect."""

from typing import Any


def error_body(message: str, parameter: str, status: int, path: str) -> dict[str, Any]:
    """An error as the API of this path words it: Anthropic's for `/v1/messages`, OpenAI's elsewhere."""
    if "/messages" in path:
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    return {"error": {"message": message, "type": "BadRequestError", "param": parameter, "code": status}}
