# SPDX-License-Identifier: Apache-2.0
"""Asks a running server through the `openai` client and measures what the answer cost."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from PIL import Image

from lab.demo.setting import KV_TOKENS
from vllm_crop.benchmarking.kv import KVCapacity, blocks_in_use
from vllm_crop.client import question_about


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        text: the model's words.
        prompt_tokens: from the usage.
        facts: the `x-crop-facts` header.
        ttft_ms: from sending the request to the first streamed token, the localizer's time included.
    """

    text: str
    prompt_tokens: int
    facts: dict[str, Any]
    ttft_ms: float


class Client:
    """One server."""

    def __init__(self, base_url: str, model: str) -> None:
        self.base_url = base_url
        self.model = model
        self.capacity = KVCapacity.of_server(base_url)
        self.openai = OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)

    def ask(self, picture: Image.Image, question: str, crop: Mapping[str, Any]) -> Answer:
        """Stream one answer; `crop` is the body field."""
        start = time.perf_counter()
        response = self._create(picture, question, crop, max_tokens=5)
        words: list[str] = []
        ttft_ms, prompt_tokens = math.nan, 0
        for chunk in response.parse():
            if chunk.choices and chunk.choices[0].delta.content:
                if math.isnan(ttft_ms):
                    ttft_ms = 1000 * (time.perf_counter() - start)
                words.append(chunk.choices[0].delta.content)
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
        return Answer("".join(words), prompt_tokens, json.loads(response.headers["x-crop-facts"]), ttft_ms)

    def kv_blocks(self, picture: Image.Image, question: str, crop: Mapping[str, Any]) -> int:
        """The most KV blocks in use while an answer is generated, from /metrics."""
        response = self._create(picture, question, crop, max_tokens=KV_TOKENS, ignore_eos=True)
        return max(blocks_in_use(self.base_url, self.capacity) for _ in response.parse())

    def _create(
        self,
        picture: Image.Image,
        question: str,
        crop: Mapping[str, Any],
        max_tokens: int,
        **extra: Any,
    ) -> Any:
        return self.openai.chat.completions.with_raw_response.create(
            model=self.model,
            messages=question_about(picture, question),
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"crop": crop, **extra},
        )
