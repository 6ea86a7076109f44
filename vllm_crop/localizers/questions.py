# SPDX-License-Identifier: Apache-2.0
"""Which question each image of a conversation is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_crop.localizers.settings import Pinning

LONGEST_QUESTION = 4000  # characters; of more, the last ones count
_IMAGE_PARTS = frozenset({"image_url", "image_pil", "image_embeds", "input_image", "image"})
_TEXT_PARTS = frozenset({"text", "input_text"})


@dataclass(frozen=True)
class _Turn:
    text: str
    num_images: int


def questions_of(messages: Sequence[Mapping[str, Any]], conversation: Pinning) -> list[str | None]:
    """Per image of the conversation, in prompt order; None where there is no question.

    Pinned, an image's question is the text of the message it came with, so that it stays what it is while
    the conversation goes on: of the next message with text if that one has none, else of the one before.

    Args:
        messages: as of the chat completions API; vLLM turns those of every other API into these.
        conversation: see `LocalizerConfig.conversation`.
    """
    turns = [_read(message) for message in messages]
    asked = [
        (index, turn.text) for index, turn in enumerate(turns) if turn.text and _is_user(messages[index])
    ]
    questions: list[str | None] = []
    for index, turn in enumerate(turns):
        if not turn.num_images:
            continue
        question = None
        if asked and conversation == "latest":
            question = asked[-1][1]
        elif asked and conversation == "pinned":
            question = next((text for at, text in asked if at >= index), asked[-1][1])
        questions += [question] * turn.num_images
    return questions


def normalised(question: str) -> str:
    """As it is shown to the localizer and remembered: without needless spaces, and not without end."""
    return " ".join(question.split())[-LONGEST_QUESTION:]


def is_image(part: Mapping[str, Any]) -> bool:
    """Whether a part of a message is an image."""
    kind = part.get("type")
    return kind in _IMAGE_PARTS or (kind is None and bool(_IMAGE_PARTS.intersection(part)))


def _is_user(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "user"


def _read(message: Mapping[str, Any]) -> _Turn:
    content = message.get("content")
    if isinstance(content, str):
        return _Turn(normalised(content), 0)
    texts, num_images = [], 0
    for part in content or ():
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type")
        if kind in _TEXT_PARTS or (kind is None and "text" in part):
            texts.append(str(part.get("text") or ""))
        elif is_image(part):
            num_images += 1
    return _Turn(normalised(" ".join(texts)), num_images)
