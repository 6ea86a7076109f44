# SPDX-License-Identifier: Apache-2.0
"""Where each image of a conversation stands: with which message it came, in how much detail it is wanted."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from vllm_crop.localizers.questions import is_image
from vllm_crop.planning.image_budgets import Detail, Shown

_DETAILS: tuple[Detail, ...] = get_args(Detail)


def shown_in(messages: Sequence[Mapping[str, Any]]) -> list[Shown]:
    """Per image of the conversation, in prompt order.

    Args:
        messages: as of the chat completions API; vLLM turns those of every other API into these.
    """
    shown: list[Shown] = []
    message = 0
    for each in messages:
        content = each.get("content")
        parts = [] if content is None or isinstance(content, str) else content
        details = [_detail(part) for part in parts if isinstance(part, Mapping) and is_image(part)]
        shown += [Shown(message, detail) for detail in details]
        message += bool(details)
    return shown


def _detail(part: Mapping[str, Any]) -> Detail:
    """OpenAI has it beside the address: in chat completions within `image_url`, in responses next to it."""
    found = part.get("detail")
    for value in part.values():
        if isinstance(value, Mapping):
            found = value.get("detail", found)
    return next((detail for detail in _DETAILS if detail == found), "auto")
