# SPDX-License-Identifier: Apache-2.0
"""The JSON shapes clients expect from each of the APIs that vLLM speaks."""

from typing import Any


def error_body(message: str, parameter: str, status: int, path: str) -> dict[str, Any]:
    """An error as the API of this path words it: Anthropic's for `/v1/messages`, OpenAI's elsewhere."""
    if "/messages" in path:
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    return {"error": {"message": message, "type": "BadRequestError", "param": parameter, "code": status}}
