# SPDX-License-Identifier: Apache-2.0
"""Asks a server about a picture with the `openai` client, and reads what the server made of it.

    from vllm_crop.client import CropClient
    client = CropClient("http://localhost:8000/v1")
    answer = client.ask(picture, "What does the sign say?", {"regions": [[0.54, 0.17, 0.79, 0.42]]})
    print(answer.text, answer.facts["tokens_avg"], "of", answer.facts["tokens"], "visual tokens")

Any client does: this one spares the data URL and the header. Needs the extra `openai`, which vLLM brings.
"""

import base64
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from vllm_crop.crop_params import FACTS_HEADER


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_part(picture: Image.Image) -> dict[str, Any]:
    """The picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def question_about(pictures: Image.Image | Sequence[Image.Image], question: str) -> list[Any]:
    """The messages of a question about one picture or several."""
    pictures = [pictures] if isinstance(pictures, Image.Image) else pictures
    content = [*map(image_part, pictures), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def facts_of(headers: Mapping[str, str]) -> dict[str, Any] | None:
    """What a response's headers say of its images; None from a server that does not prune."""
    header = headers.get(FACTS_HEADER)
    return None if header is None else dict(json.loads(header))


@dataclass(frozen=True)
class CropAnswer:
    """An answer and what it cost.

    Attributes:
        facts: totals and, under `images`, what became of each image; empty from a server that does not prune.
        prompt_tokens, completion_tokens: from the usage.
        ttft_ms: from sending the request to the first streamed token, the localizer's time included; NaN
            where the server streamed none.
        token_ids, prompt_token_ids: where the request asked for them with vLLM's `return_token_ids`.
    """

    text: str
    facts: dict[str, Any]
    prompt_tokens: int
    ttft_ms: float
    completion_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


class CropClient:
    """One server. Raises what the `openai` client raises."""

    def __init__(self, base_url: str, model: str | None = None, **options: Any) -> None:
        """Connect.

        Args:
            base_url: with `/v1`.
            model: the first that the server serves where left out.
            options: of `openai.OpenAI`; the key is taken from OPENAI_API_KEY where left out, and nothing is
                sent twice.
        """
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.openai: Any = OpenAI(**{"base_url": base_url, "api_key": key, "max_retries": 0, **options})
        self._model = model

    @cached_property
    def model(self) -> str:
        """The name requests use."""
        return self._model if self._model is not None else str(self.openai.models.list().data[0].id)

    def send(
        self,
        pictures: Image.Image | Sequence[Image.Image],
        question: str,
        crop: Mapping[str, Any] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Send a question about pictures; its raw response, to be parsed. Arguments as of `send_messages`."""
        return self.send_messages(question_about(pictures, question), crop, extra_body, **options)

    def send_messages(
        self,
        messages: Sequence[Any],
        crop: Mapping[str, Any] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Send a chat completion; its raw response, to be parsed.

        Args:
            crop: the body field; left out where None.
            extra_body, options: of `chat.completions.create`.
        """
        field = {} if crop is None else {"crop": dict(crop)}
        return self.openai.chat.completions.with_raw_response.create(
            model=self.model,
            messages=list(messages),
            extra_body={**field, **(extra_body or {})},
            **{"temperature": 0, **options},
        )

    def ask(
        self,
        pictures: Image.Image | Sequence[Image.Image],
        question: str,
        crop: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> CropAnswer:
        """Stream an answer about pictures; arguments as of `send`."""
        return self.ask_messages(question_about(pictures, question), crop, **options)

    def ask_messages(
        self, messages: Sequence[Any], crop: Mapping[str, Any] | None = None, **options: Any
    ) -> CropAnswer:
        """Stream an answer; arguments as of `send_messages`."""
        start = time.perf_counter()
        streamed: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        response = self.send_messages(messages, crop, **streamed, **options)
        words: list[str] = []
        token_ids: list[int] = []
        prompt_token_ids: tuple[int, ...] = ()
        ttft_ms, prompt_tokens, completion_tokens = math.nan, 0, 0
        for chunk in response.parse():
            prompt_token_ids = prompt_token_ids or tuple(getattr(chunk, "prompt_token_ids", None) or ())
            for choice in chunk.choices:
                words.append(choice.delta.content or "")
                token_ids += getattr(choice, "token_ids", None) or ()
            if math.isnan(ttft_ms) and (token_ids or any(words)):
                ttft_ms = 1000 * (time.perf_counter() - start)
            if chunk.usage is not None:
                prompt_tokens, completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        facts = facts_of(response.headers) or {}
        return CropAnswer(
            "".join(words),
            facts,
            prompt_tokens,
            ttft_ms,
            completion_tokens,
            tuple(token_ids),
            prompt_token_ids,
        )
