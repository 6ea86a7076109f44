# SPDX-License-Identifier: Apache-2.0
"""What is made of a localizer that fails: nobody waits for one that is gone, and the log stays readable."""

import logging
import time
from collections.abc import Callable

Clock = Callable[[], float]


class CircuitBreaker:
    """Stops asking a localizer that does not answer, and asks again by itself.

    Without it every request would wait `timeout_s` for as long as the localizer hangs. After `max_failures`
    requests in a row it opens; every `seconds` one request tries whether the localizer is back, and the first
    answer closes it.
    """

    def __init__(self, max_failures: int, seconds: float, clock: Clock = time.monotonic) -> None:
        self.max_failures, self.seconds, self._clock = max_failures, seconds, clock
        self._failures = 0
        self._next_try = 0.0

    @property
    def is_open(self) -> bool:
        """Whether requests go by without asking."""
        return self._failures >= self.max_failures

    def admits(self) -> bool:
        """Whether a request may ask now. An open breaker admits one, and the next after `seconds`."""
        if not self.is_open:
            return True
        now = self._clock()
        if now < self._next_try:
            return False
        self._next_try = now + self.seconds
        return True

    def hand_back(self) -> None:
        """Let the next request try: the one that was admitted has found nothing out."""
        self._next_try = self._clock()

    def failed(self) -> bool:
        """Note a request that got no answer; whether this has opened the breaker."""
        self._failures += 1
        self._next_try = self._clock() + self.seconds
        return self._failures == self.max_failures

    def succeeded(self) -> bool:
        """Note an answer; whether this has closed the breaker."""
        was_open, self._failures = self.is_open, 0
        return was_open


class ThrottledLog:
    """Warnings that clients can cause, at most one of a kind every `seconds`: nobody may flood the log."""

    def __init__(self, logger: logging.Logger, seconds: float = 10.0, clock: Clock = time.monotonic) -> None:
        self._logger, self._seconds, self._clock = logger, seconds, clock
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, message: str, *args: object, traceback: bool = False) -> None:
        """Log one line, maybe with the traceback of the exception at hand; `kind` is one of few."""
        now = self._clock()
        if now - self._last.get(kind, -self._seconds) < self._seconds:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._last[kind] = now
        if more := self._left_out.pop(kind, 0):
            message, args = f"{message} (%d more since the last line)", (*args, more)
        self._logger.warning(message, *args, exc_info=traceback)
