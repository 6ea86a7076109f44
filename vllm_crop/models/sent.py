# SPDX-License-Identifier: Apache-2.0
"""Which items go to the engine with their data, and which are only named.

vLLM keeps two caches of processed items, one beside the engine and one in the API process that knows what the
other has. They must remember and forget alike, in the same order (vllm/multimodal/cache/base.py).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_WITHHELD = "crop_withheld"  # key of the engine's input: per hash what the cache kept beside it


def newly_sent(prompt: Any) -> list[str]:
    """The items of a prompt whose data goes along: vLLM's cache did not know them before."""
    return [mm_hash for mm_hash, _ in _with_data(prompt)]


@contextmanager
def forgotten_on_failure(cache: Any, hashes: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Let the cache forget what was put into it within the block, if that fails.

    vLLM puts items there before it looks for their places in the prompt: where it finds none, the next
    request with such an image would be told that the engine has it.

    Args:
        cache: None where there is none.
        hashes: of all items of the prompt, by modality.
    """
    new = [
        mm_hash
        for items in (hashes.values() if cache is not None else ())
        for mm_hash in items
        if not cache.is_cached_item(mm_hash)
    ]
    try:
        yield
    except BaseException:
        for mm_hash in new:
            cache.invalidate(mm_hash)
        raise


def withhold(prompt: Any, cache: Any) -> None:
    """Let the cache know nothing of a prompt's new items until `enter`: when they are sent is not sure.

    Called by the thread that looks items up for all, so nobody can have been told of them.
    """
    from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache

    if not isinstance(cache, LruKeyReplicatedSenderCache):
        return  # the others keep the data themselves
    withheld = prompt[_WITHHELD] = {}
    for mm_hash in newly_sent(prompt):
        if cache.is_cached_item(mm_hash):
            _, withheld[mm_hash] = cache.get_and_update_item(None, mm_hash)
            cache.invalidate(mm_hash)


def enter(prompt: Any, cache: Any) -> None:
    """Let the cache know what `withhold` has kept from it: the prompt is on its way, others come later."""
    withheld = prompt.get(_WITHHELD, {}) if isinstance(prompt, dict) else {}
    for mm_hash, item in _with_data(prompt) if withheld else ():
        if mm_hash in withheld and not cache.is_cached_item(mm_hash):
            cache.get_and_update_item((item, withheld[mm_hash]), mm_hash)


def _with_data(prompt: Any) -> list[tuple[str, Any]]:
    if not isinstance(prompt, dict) or prompt.get("type") != "multimodal":
        return []
    return [
        (mm_hash, item)
        for modality, items in prompt["mm_kwargs"].items()
        for item, mm_hash in zip(items, prompt["mm_hashes"][modality], strict=True)
        if item is not None
    ]


class OnTheWay:
    """Items that were processed for the engine and may be given up before they get there.

    What does get there stays where it is. Given up by the event loop while vLLM's thread for multimodal data
    is at work: whoever comes second makes the cache forget them, before that thread can tell another request
    that the engine has them.
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
