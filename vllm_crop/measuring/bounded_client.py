# SPDX-License-Identifier: Apache-2.0
"""Asks a server nobody knows yet: no question takes longer than was said, no answer is read without end."""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from vllm_crop.client import CropClient
from vllm_crop.errors import CropError

MAX_ANSWER_BYTES = 4 << 20  # /metrics of a server with many models and labels is the longest
CONNECT_S = 5.0
T = TypeVar("T")


class EndpointError(CropError):
    """The endpoint cannot be asked."""


class BoundedClient(CropClient):
    """A CropClient whose questions end."""

    def __init__(self, base_url: str, model: str | None, timeout_s: float) -> None:
        """Connects on first use.

        Args:
            timeout_s: for each question, from looking up the name to the last byte that is read.
        """
        from openai import DefaultHttpxClient, Timeout

        hooks: Any = {"response": [self._bound]}
        super().__init__(
            base_url,
            model,
            timeout=Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
            http_client=DefaultHttpxClient(event_hooks=hooks),
            # What is compressed may be any size once it is read.
            default_headers={"Accept-Encoding": "identity"},
        )
        self.timeout_s = timeout_s
        self._ends = 0.0

    def within_time(self, ask: Callable[[], T]) -> T:
        """Let `ask` ask one question; what it raises is raised.

        Timeouts of an HTTP client are for a single read: who sends a byte a second, of headers even, meets
        them all. A thread can be left behind.

        Raises:
            TimeoutError: it took too long.
        """
        self._ends = time.monotonic() + self.timeout_s
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(ask())
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer.result(self.timeout_s)

    def _bound(self, response: Any) -> None:
        """Make a response end where it is too long or late; called before its body is read."""
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise EndpointError("it compresses answers for which that was not asked, so they are not read")
        inner, ends = response.stream, self._ends
        # The HTTP library that openai uses is not the same one in all of its versions.
        streams: Any = importlib.import_module(type(response).__module__.partition(".")[0])

        class Bounded(streams.SyncByteStream):  # type: ignore[misc]
            def __iter__(self) -> Iterator[bytes]:
                size = 0
                for chunk in inner:
                    size += len(chunk)
                    if size > MAX_ANSWER_BYTES:
                        raise EndpointError(
                            f"it sends an answer of more than {MAX_ANSWER_BYTES >> 20} MiB, as no server "
                            "does that is asked for one token"
                        )
                    if time.monotonic() > ends:
                        raise TimeoutError
                    yield chunk

            def close(self) -> None:
                inner.close()

        response.stream = Bounded()
