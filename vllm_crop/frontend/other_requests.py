# SPDX-License-Identifier: Apache-2.0
"""Requests of APIs that vLLM turns into chat completions: what of `crop` is kept on the way.

Only where no middleware reads it (embedded.py) does it matter.
"""

import logging
from typing import Any

from vllm_crop.crop_params import MISPLACED_IN

logger = logging.getLogger("vllm.plugins.crop")
_KEPT = ("crop", *MISPLACED_IN)
_dropping: dict[str, bool] = {}  # models of requests that drop what they do not know; whether that was said


def keep_crop(request: Any, chat: Any) -> None:
    """Put into a chat completion's request the `crop` of the one it was made of.

    Args:
        request: of another API.
        chat: made of it by vLLM, which takes the fields it knows.
    """
    fields = getattr(request, "model_extra", None)
    if fields is None:  # its model was in a route before the plugin was loaded
        _dropping.setdefault(type(request).__name__, False)
        return
    for name in _KEPT:
        # A field that the chat completion's model knows would get what nobody has validated.
        if name in fields and name not in type(chat).model_fields:
            setattr(chat, name, fields[name])


def say_what_is_dropped() -> None:
    """Warn, once, of requests in which nobody would see the field."""
    for name in [name for name, said in _dropping.items() if not said]:
        _dropping[name] = True
        logger.warning(
            "The field `crop` of requests that this server reads as %s is dropped before anyone sees it, and "
            "they are served unpruned: their routes were declared before vLLM loaded its plugins. Call "
            "vllm.plugins.load_general_plugins() before that.",
            name,
        )
