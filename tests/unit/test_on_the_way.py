# SPDX-License-Identifier: Apache-2.0
"""vLLM's two caches of processed items remember and forget alike, whatever is given up or held back."""

from collections import deque
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_crop.models.sent import OnTheWay, enter, withhold


def test_what_gets_there_stays() -> None:
    forgotten: list[str] = []
    OnTheWay().note(["one"], forgotten.append)
    assert forgotten == []


def test_given_up_after_it_was_processed() -> None:
    forgotten: list[str] = []
    way = OnTheWay()
    way.note(["one", "other"], forgotten.append)
    way.give_up()
    way.give_up()
    assert forgotten == ["one", "other"]


def test_given_up_while_it_is_processed() -> None:
    forgotten: list[str] = []
    way = OnTheWay()
    way.give_up()
    way.note(["one"], forgotten.append)
    assert forgotten == ["one"]


class Caches:
    """vLLM's cache of the API process and the one beside the engine, with room for four items each."""

    def __init__(self) -> None:
        lru = pytest.importorskip("vllm.multimodal.cache.lru")
        room = SimpleNamespace(mm_processor_cache_gb=4.5 / 1024)
        config = SimpleNamespace(get_multimodal_config=lambda: room)
        self.api, self.engine = (
            lru.LruKeyReplicatedSenderCache(config),
            lru.LruKeyReplicatedReceiverCache(config),
        )

    def processed(self, mm_hash: str) -> Any:
        """A prompt with one item, as the thread for multimodal data leaves it."""
        import torch
        from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

        data = MultiModalFieldElem(data=torch.zeros(1 << 18), field=MultiModalBatchedField())
        known = self.api.is_cached_item(mm_hash)
        given = None if known else (MultiModalKwargsItem({"pixel_values": data}), [])
        item, _ = self.api.get_and_update_item(given, mm_hash)
        return {"type": "multimodal", "mm_kwargs": {"image": [item]}, "mm_hashes": {"image": [mm_hash]}}

    def send(self, prompt: Any) -> None:
        """Hand it to the engine; a MultiModalCacheMissError if that has not got what is named."""
        enter(prompt, self.api)
        ((item,), (mm_hash,)) = prompt["mm_kwargs"]["image"], prompt["mm_hashes"]["image"]
        self.engine.get_and_update_item(item, mm_hash)


def test_what_was_withheld_pushes_out_what_it_does_beside_the_engine() -> None:
    caches, random = Caches(), Random(0)
    recent: deque[str] = deque(maxlen=4)
    for number in range(200):
        batch = caches.processed(f"batch {number}")
        withhold(batch, caches.api)
        caches.send(batch)
        caches.send(caches.processed(f"chat {number}"))
        recent.append(f"chat {number}")
        caches.send(caches.processed(random.choice(recent)))
    assert list(caches.api._cache) == list(caches.engine._cache)


def test_nobody_finds_what_is_withheld() -> None:
    caches = Caches()
    first = caches.processed("one")
    withhold(first, caches.api)
    other = caches.processed("one")
    assert other["mm_kwargs"]["image"] != [None]  # it comes with its data
    caches.send(other)
    caches.send(first)
    assert caches.processed("one")["mm_kwargs"]["image"] == [None]
