# SPDX-License-Identifier: Apache-2.0
"""Asks a running server through the `openai` client and measures what the answer cost."""

import base64
import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from PIL import Image

from vllm_crop.benchmarking.kv import KVCapacity, blocks_in_use

QUESTION = "What does the sign say?"


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        text: the model's words.
        prompt_tokens: from the usage.
        facts: the `x-crop-facts` header.
        ttft_ms: from sending the request to the first streamed token.
        kv_blocks: the most KV blocks in use while the answer was generated, from /metrics; 0 if not looked
            at. Blocks of one server are all the same size.
    """

    text: str
    prompt_tokens: int
    facts: dict[str, Any]
    ttft_ms: float
    kv_blocks: int


class Client:
    """One server, one question."""

    def __init__(self, base_url: str, model: str) -> None:
        self.base_url = base_url
        self.model = model
        self.capacity = KVCapacity.of_server(base_url)
        self.openai = OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)

    def ask(
        self,
        picture: Image.Image,
        crop: Mapping[str, Any] | None,
        max_tokens: int = 1,
        look_at_kv: bool = False,
    ) -> Answer:
        """Stream one answer about a picture; `crop` is the body field, None leaves it out."""
        messages = question_about(picture)
        start = time.perf_counter()
        response = self.openai.chat.completions.with_raw_response.create(
            model=self.model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                "ignore_eos": True,
                "skip_special_tokens": False,
                **({} if crop is None else {"crop": crop}),
            },
        )
        facts = json.loads(response.headers["x-crop-facts"])
        words: list[str] = []
        ttft_ms, kv_blocks, prompt_tokens = math.nan, 0, 0
        for chunk in response.parse():
            if chunk.choices and chunk.choices[0].delta.content:
                if math.isnan(ttft_ms):
                    ttft_ms = 1000 * (time.perf_counter() - start)
                elif look_at_kv:
                    kv_blocks = max(kv_blocks, blocks_in_use(self.base_url, self.capacity))
                words.append(chunk.choices[0].delta.content)
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
        return Answer("".join(words), prompt_tokens, facts, ttft_ms, kv_blocks)


def question_about(picture: Image.Image) -> list[Any]:
    """The messages of the demo's question."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": QUESTION},
    ]
    return [{"role": "user", "content": content}]


def data_url(picture: Image.Image) -> str:
    """The picture as a PNG data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
