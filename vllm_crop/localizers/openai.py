# SPDX-License-Identifier: Apache-2.0
"""Asks another OpenAI-compatible server, such as a `vllm serve` of a model trained to locate."""

import asyncio
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from PIL import Image

from vllm_crop.data_url import data_url
from vllm_crop.localizers.base import Asked, LocalizerError, Located
from vllm_crop.localizers.dialects import dialect_with
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import shrink

_WHOLE_PATCHES = 28  # pixels; Qwen2.5-VL speaks of the pixels of an image whose sides are multiples of it


class OpenAILocalizer:
    """A Localizer behind HTTP. Image URLs of clients are never passed on: it gets a small picture."""

    name: Asked = "openai"

    def __init__(self, config: LocalizerConfig) -> None:
        """Connects on first use.

        Raises:
            LocalizerError: the package openai is not installed.
        """
        if find_spec("openai") is None:
            raise LocalizerError("localizer.kind 'openai' needs: pip install openai")
        self.config = config
        self.dialect = dialect_with(config.dialect, config.prompt)
        self.version = f"openai {config.base_url} {config.model} {config.dialect} {self.dialect.prompt}"
        self._options: dict[str, Any] = {
            "base_url": config.base_url,
            "api_key": os.environ.get(config.api_key_env) or "none",
            "max_retries": config.max_retries,
            "timeout": config.timeout_s,
        }

    # A localizer that sends us elsewhere is none: the key and the picture stay where they belong.

    @cached_property
    def _client(self) -> Any:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        return AsyncOpenAI(http_client=DefaultAsyncHttpxClient(follow_redirects=False), **self._options)

    @cached_property
    def _offline_client(self) -> Any:
        from openai import DefaultHttpxClient, OpenAI

        return OpenAI(http_client=DefaultHttpxClient(follow_redirects=False), **self._options)

    async def locate(self, image: Image.Image, question: str) -> Located:
        """Ask, and read the answer strictly."""
        url, size = await asyncio.to_thread(_picture, image, self.config)
        with _as_localizer_error():
            completion = await self._client.chat.completions.create(**self._request(url, question))
        return self._read(completion, size)

    def locate_now(self, image: Image.Image, question: str) -> Located:
        """The same without an event loop."""
        url, size = _picture(image, self.config)
        with _as_localizer_error():
            completion = self._offline_client.chat.completions.create(**self._request(url, question))
        return self._read(completion, size)

    def _request(self, url: str, question: str) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": url}}
        content = [image, {"type": "text", "text": self.dialect.ask(question)}]
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.dialect.max_tokens,
            "extra_body": self.config.extra_body or None,
            **({"logprobs": True} if self.config.logprobs else {}),
        }

    def _read(self, completion: Any, size: tuple[int, int]) -> Located:
        said, confidence = _read_completion(completion)
        return Located(self.dialect.read(said, size), confidence)


@contextmanager
def _as_localizer_error() -> Iterator[None]:
    """Whatever the client raises, but for a cancellation, is a failure of the localizer."""
    from openai import OpenAIError

    try:
        yield
    except OpenAIError as error:
        raise LocalizerError(f"{type(error).__name__}: {str(error)[:200]}") from None


def _read_completion(completion: Any) -> tuple[str, float | None]:
    """Text and probability. What answers may be no OpenAI server at all: nothing is taken for granted."""
    try:
        choice = completion.choices[0]
        said = choice.message.content
        tokens = choice.logprobs.content if choice.logprobs is not None else None
        confidence = math.exp(sum(min(0.0, float(token.logprob)) for token in tokens)) if tokens else None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise LocalizerError("the answer is no chat completion") from None
    if not isinstance(said, str):
        raise LocalizerError("the answer has no text")
    return said, confidence


def _picture(image: Image.Image, config: LocalizerConfig) -> tuple[str, tuple[int, int]]:
    """A data URL, and the size in pixels of what it shows."""
    scale = min(1.0, config.thumbnail_side / max(image.size))
    unit = _WHOLE_PATCHES if config.dialect == "pixels" else 1
    width, height = (max(unit, round(side * scale / unit) * unit) for side in image.size)
    return data_url(shrink(image, (width, height))), (width, height)
