# SPDX-License-Identifier: Apache-2.0
"""Which items go to the engine with their data, and which are only named."""

import threading
from collections.abc import Callable, Sequence
from typing import Any


def newly_sent(prompt: Any) -> list[str]:
    """The items of a prompt whose data goes along: vLLM's cache did not know them before."""
    if not isinstance(prompt, dict) or prompt.get("type") != "multimodal":
        return []
    return [
        mm_hash
        for modality, items in prompt["mm_kwargs"].items()
        for item, mm_hash in zip(items, prompt["mm_hashes"][modality], strict=True)
        if item is not None
    ]


class OnTheWay:
    """Items that were processed for the engine and may be given up before they get there.

    vLLM's two caches of processed items must forget alike, so what does get there stays where it is. Given up
    by the event loop while vLLM's thread for multimodal data is at work: whoever comes second makes the cache
    forget them, before that thread can tell another request that the engine has them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget: list[Callable[[], None]] = []
        self._given_up = False

    def note(self, sent: Sequence[str], forget: Callable[[str], None]) -> None:
        """Say what the cache takes for sent; called by the thread that processes."""
        calls = [lambda mm_hash=mm_hash: forget(mm_hash) for mm_hash in sent]
        with self._lock:
            self._forget += calls
            if self._given_up:
                self._forget_all()

    def give_up(self) -> None:
        """Nothing of it will get there."""
        with self._lock:
            self._given_up = True
            self._forget_all()

    def _forget_all(self) -> None:
        for call in self._forget:
            call()
        self._forget.clear()
