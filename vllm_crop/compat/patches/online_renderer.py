# SPDX-License-Identifier: Apache-2.0
"""Notes which request is being rendered: its parameters, and `crop` where no middleware has read it.

Why: a renderer gets prompts without their parameters; `temperature: -1` is refused after rendering. And a
server that embeds vLLM's serving classes without its HTTP app has no middleware: pruning asked for would be
ignored without a word.
Replaces: OnlineRenderer.preprocess_chat, OnlineRenderer.preprocess_cmpl (vllm/renderers/online_renderer.py).
Remove when: vLLM hands a renderer the request.
"""

import functools
from typing import Any

REASON = "knows a request's parameters before its images are localized, and `crop` where no middleware is"
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
        note = getattr(getattr(self, "renderer", None), "note_request", None)  # our renderer's only
        if note is not None:
            note(kwargs.get("request", args[0] if args else None))
        return preprocess(self, *args, **kwargs)

    return preprocess_and_note
