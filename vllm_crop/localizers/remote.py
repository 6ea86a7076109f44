# SPDX-License-Identifier: Apache-2.0
"""Asks another OpenAI-compatible server, such as a `vllm serve` of a model trained to locate."""

import importlib
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from vllm_crop.client import data_url
from vllm_crop.localizers.base import (
    LocalizerAnswer,
    LocalizerError,
    LocalizerName,
    UnreadableAnswerError,
    nothing,
)
from vllm_crop.localizers.dialects import dialect_with
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture, off_the_loop, shrink

MAX_ANSWER_BYTES = 256 << 10  # an answer with its logprobs takes about 20 KiB
_WHOLE_PATCHES = 28  # pixels; Qwen2.5-VL speaks of the pixels of an image whose sides are multiples of it


class OpenAILocalizer:
    """A Localizer behind HTTP. Image URLs of clients are never passed on: it gets a small picture."""

    name: LocalizerName = "openai"

    def __init__(self, config: LocalizerConfig) -> None:
        """Connects on first use.

        Raises:
            LocalizerError: the package openai is not installed.
        """
        if find_spec("openai") is None:
            raise LocalizerError("localizer.kind 'openai' needs: pip install 'vllm-crop[openai]'")
        self.config = config
        self.dialect = dialect_with(config.dialect, config.prompt)
        self.version = f"openai {config.base_url} {config.model} {config.dialect} {self.dialect.prompt}"
        self._options: dict[str, Any] = {
            "base_url": config.base_url,
            "api_key": os.environ.get(config.api_key_env) or "none",
            "max_retries": config.max_retries,
            "timeout": config.timeout_s,
            # What is compressed may be any size once it is read.
            "default_headers": {"Accept-Encoding": "identity"},
        }

    # A localizer that sends us elsewhere is none: the key and the picture stay where they belong.

    @cached_property
    def _client(self) -> Any:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        hooks: Any = {"response": [_bound_async]}
        return AsyncOpenAI(
            http_client=DefaultAsyncHttpxClient(follow_redirects=False, event_hooks=hooks), **self._options
        )

    @cached_property
    def _offline_client(self) -> Any:
        from openai import DefaultHttpxClient, OpenAI

        hooks: Any = {"response": [_bound]}
        return OpenAI(
            http_client=DefaultHttpxClient(follow_redirects=False, event_hooks=hooks), **self._options
        )

    async def locate(
        self,
        picture: Picture,
        question: str,
        salt: str | None = None,
        waiting: Callable[[], None] = nothing,
    ) -> LocalizerAnswer:
        """Ask, and read the answer strictly. The salt stays here: the other server's caches are its own."""
        url, size = await off_the_loop(_thumbnail, picture, self.config)
        waiting()
        with _as_localizer_error():
            completion = await self._client.chat.completions.create(**self._request(url, question))
        return self._read(completion, size)

    def locate_now(self, picture: Picture, question: str, salt: str | None = None) -> LocalizerAnswer:
        """The same without an event loop."""
        url, size = _thumbnail(picture, self.config)
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

    def _read(self, completion: Any, size: tuple[int, int]) -> LocalizerAnswer:
        said, confidence = _read_completion(completion)
        return LocalizerAnswer(self.dialect.read(said, size), confidence)


@contextmanager
def _as_localizer_error() -> Iterator[None]:
    """Whatever the client raises, but for a cancellation, is a failure of the localizer.

    Python may raise anything for what a hostile server sends; only a server that cannot be reached, or that
    says it has failed, is no answer.
    """
    from openai import APIConnectionError, APIStatusError

    try:
        yield
    except (APIConnectionError, APIStatusError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error.__cause__, UnreadableAnswerError):
            raise error.__cause__ from None
        raise LocalizerError(said) from None
    except LocalizerError:
        raise
    except Exception as error:
        raise UnreadableAnswerError(f"no chat completion ({type(error).__name__})") from None


def _read_completion(completion: Any) -> tuple[str, float | None]:
    """Text and probability. What answers may be no OpenAI server at all: nothing is taken for granted."""
    try:
        choice = completion.choices[0]
        said = choice.message.content
        tokens = choice.logprobs.content if choice.logprobs is not None else None
        logprob = sum(min(0.0, _number(token.logprob)) for token in tokens) if tokens else None
    except (AttributeError, IndexError, TypeError, ValueError, OverflowError, KeyError):
        raise UnreadableAnswerError("the answer is no chat completion") from None
    if not isinstance(said, str):
        raise UnreadableAnswerError("the answer has no text")
    return said, None if logprob is None else math.exp(logprob)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no number")
    return float(value)


async def _bound_async(response: Any) -> None:
    """Make a response end where an answer is too long; called before its body is read."""
    _check_headers(response)
    inner = response.stream

    class Bounded(_streams_of(response).AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in inner:
                size += len(chunk)
                _check_size(size)
                yield chunk

        async def aclose(self) -> None:
            await inner.aclose()

    response.stream = Bounded()


def _bound(response: Any) -> None:
    _check_headers(response)
    inner = response.stream

    class Bounded(_streams_of(response).SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in inner:
                size += len(chunk)
                _check_size(size)
                yield chunk

        def close(self) -> None:
            inner.close()

    response.stream = Bounded()


def _streams_of(response: Any) -> Any:
    """The HTTP library that openai uses, which is not the same one in all of its versions."""
    return importlib.import_module(type(response).__module__.partition(".")[0])


def _check_headers(response: Any) -> None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise UnreadableAnswerError("a compressed answer, which was not asked for")
    length = response.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20:
        _check_size(int(length))


def _check_size(size: int) -> None:
    if size > MAX_ANSWER_BYTES:
        raise UnreadableAnswerError(f"an answer of more than {MAX_ANSWER_BYTES >> 10} KiB")


def _thumbnail(picture: Picture, config: LocalizerConfig) -> tuple[str, tuple[int, int]]:
    """A data URL, and the size in pixels of what it shows."""
    image = picture.open()
    scale = min(1.0, config.thumbnail_side / max(image.size))
    unit = _WHOLE_PATCHES if config.dialect == "pixels" else 1
    width, height = (max(unit, round(side * scale / unit) * unit) for side in image.size)
    return data_url(shrink(image, (width, height))), (width, height)
