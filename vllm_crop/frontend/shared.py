# SPDX-License-Identifier: Apache-2.0
"""Answers that are asked for once: remembered, and shared by those who ask while the first one waits."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


@dataclass
class _Running(Generic[Answer]):
    task: "asyncio.Task[Answer]"
    waiting: int = 0


class SharedAnswers(Generic[Answer]):
    """A bounded cache whose misses are made once, however many wait for them.

    Failures are not remembered. When the last one who waits goes away, the work is cancelled.
    """

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._known: OrderedDict[Hashable, Answer] = OrderedDict()
        self._running: dict[Hashable, _Running[Answer]] = {}

    def get(self, key: Hashable) -> Answer | None:
        """The answer, if it is known."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def put(self, key: Hashable, answer: Answer) -> None:
        """Remember an answer, and forget the one not asked for the longest."""
        self._known[key] = answer
        self._known.move_to_end(key)
        while len(self._known) > self.max_entries:
            self._known.popitem(last=False)

    async def make(self, key: Hashable, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, known or made now.

        Raises:
            Exception: whatever the work raises.
        """
        if (known := self.get(key)) is not None:
            return known
        running = self._running.get(key)
        if running is None:
            # In a context of its own: the work is nobody's request, though somebody's asked for it first.
            running = self._running[key] = _Running(asyncio.create_task(_run(work), context=Context()))
        running.waiting += 1
        try:
            # Shielded: one who goes away must not take the answer from the others.
            answer = await asyncio.shield(running.task)
        finally:
            running.waiting -= 1
            if not running.waiting:
                # Gone at once: who comes now must not wait for work that is being cancelled.
                if self._running.get(key) is running:
                    del self._running[key]
                running.task.cancel()
        self.put(key, answer)
        return answer


async def _run(work: Callable[[], Awaitable[Answer]]) -> Answer:
    return await work()
