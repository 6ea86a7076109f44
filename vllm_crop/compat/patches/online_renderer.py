# SPDX-License-Identifier: Apache-2.0
"""Notes which request is being rendered, so that one that vLLM will refuse is not localized first.

Why: a renderer gets prompts without their parameters; `temperature: -1` is refused after rendering.
Replaces: OnlineRenderer.preprocess_chat, OnlineRenderer.preprocess_cmpl (vllm/renderers/online_renderer.py).
Remove when: vLLM judges a request's parameters before it renders the prompt.
"""

import functools
from typing import Any

from vllm_crop.frontend.request_context import current_request

REASON = "knows a request's parameters before its images are localized"
METHODS = ("preprocess_chat", "preprocess_cmpl")
_MARK = "_vllm_crop_online_renderer_patched"


def patch(online_renderer: Any) -> None:
    """Wrap the methods of the class OnlineRenderer, once."""
    if hasattr(online_renderer, _MARK):
        return
    wrapped = {name: _noting(getattr(online_renderer, name)) for name in METHODS}
    setattr(online_renderer, _MARK, True)
    for name, method in wrapped.items():
        setattr(online_renderer, name, method)


def _noting(preprocess: Any) -> Any:
    # No coroutine of its own, and no names: whatever vLLM's method has become is called as ever.
    @functools.wraps(preprocess)
    def preprocess_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (context := current_request.get()) is not None:
            context.request = kwargs.get("request", args[0] if args else None)
        return preprocess(self, *args, **kwargs)

    return preprocess_and_note
