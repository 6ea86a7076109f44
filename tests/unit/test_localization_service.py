# SPDX-License-Identifier: Apache-2.0
"""How many ask a localizer at once, for how long, and what becomes of them; with one that counts."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vllm_crop.config import CropConfig
from vllm_crop.frontend import localization
from vllm_crop.frontend.localization import LocalizationService, RegionQuery
from vllm_crop.localizers.base import LocalizerAnswer, LocalizerError, nothing
from vllm_crop.localizers.thumbnails import Picture, as_picture
from vllm_crop.planning.geometry import Region


class Counting:
    """A Localizer that takes a moment, and remembers how many it had at once."""

    name, version = "engine", "counting"

    def __init__(self) -> None:
        self.running = self.most = self.asked = 0
        self.salts: list[str | None] = []
        self.error: Exception | None = None
        self.seconds = 0.02

    async def locate(
        self,
        picture: Picture,
        question: str,
        salt: str | None = None,
        waiting: Callable[[], None] = nothing,
    ) -> LocalizerAnswer:
        self.running += 1
        self.asked += 1
        self.most = max(self.most, self.running)
        self.salts.append(salt)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        return LocalizerAnswer(Region.whole(), 1.0)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    localizer = Counting()
    monkeypatch.setitem(localization.LOCALIZERS, "engine", lambda *_: localizer)
    return localizer


def service(**settings: Any) -> LocalizationService:
    config = CropConfig.from_mapping({"localizer": {"kind": "engine", **settings}})
    renderer = SimpleNamespace(model_config=SimpleNamespace(served_model_name="counted"))
    return LocalizationService(renderer, None, config)  # type: ignore[arg-type]


def images(count: int, first: int = 0, salt: str | None = None) -> list[RegionQuery]:
    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(first, first + count)]
    return [RegionQuery(as_picture(picture), "where?", salt) for picture in pictures]


def test_one_request_has_its_share_at_once_and_no_more_than_its_bound(counting: Counting) -> None:
    found = asyncio.run(service(max_running_per_request=3, max_images=10).localize(images(25)))
    assert [one.outcome for one in found] == ["region"] * 10 + ["too_many"] * 15
    assert (counting.most, counting.asked) == (3, 10)


def test_a_request_with_many_images_leaves_room_for_others(counting: Counting) -> None:
    async def both() -> float:
        asked = service(max_running=4, max_running_per_request=3)
        loop = asyncio.get_running_loop()
        many = asyncio.ensure_future(asked.localize(images(30)))
        await asyncio.sleep(counting.seconds / 2)
        start = loop.time()
        await asked.localize(images(1, first=100))
        alone = loop.time() - start
        await many
        return alone

    assert asyncio.run(both()) < 3 * counting.seconds  # and not behind thirty others


def test_who_asks_the_same_as_a_busy_request_does_not_wait_for_the_rest_of_it(counting: Counting) -> None:
    async def both() -> float:
        asked = service(max_running_per_request=1)
        loop = asyncio.get_running_loop()
        many = asyncio.ensure_future(asked.localize(images(20)))
        await asyncio.sleep(counting.seconds / 2)
        start = loop.time()
        await asked.localize(images(20)[-1:])
        alone = loop.time() - start
        await many
        return alone

    assert asyncio.run(both()) < 5 * counting.seconds


def test_what_one_tenant_was_told_is_not_known_to_another(counting: Counting) -> None:
    async def asked() -> list[bool]:
        answers = service()
        return [
            (await answers.localize(images(1, salt=salt)))[0].cached for salt in (None, "a", "b", "a", None)
        ]

    assert asyncio.run(asked()) == [False, False, False, True, True]
    assert counting.salts == [None, "a", "b"]


def test_an_answer_is_of_one_question_about_one_picture(counting: Counting) -> None:
    async def asked() -> list[bool]:
        answers = service()
        cached = []
        for number, question in ((0, "where?"), (0, "what?"), (1, "where?"), (0, "what?"), (1, "where?")):
            (query,) = images(1, first=number)
            (found,) = await answers.localize([replace(query, question=question)])
            cached.append(found.cached)
        return cached

    assert asyncio.run(asked()) == [False, False, False, True, True]
    assert counting.asked == 3


def test_a_request_counts_once_as_a_failure_however_many_images_it_has(counting: Counting) -> None:
    counting.error = LocalizerError("gone")

    async def asked() -> list[str]:
        failing = service(suspend_after=3)
        outcomes = []
        for number in range(4):
            found = await failing.localize(images(8, first=10 * number))
            outcomes.append({one.outcome for one in found})
        return outcomes

    assert asyncio.run(asked()) == [{"error"}, {"error"}, {"error"}, {"suspended"}]
    assert counting.asked == 24


def test_an_image_that_cannot_be_asked_about_says_nothing_of_the_localizer(counting: Counting) -> None:
    """One client with a picture of a thousand by one pixels must not switch localization off for all."""
    counting.error = ValueError("absolute aspect ratio must be smaller than 200")

    async def asked() -> list[str]:
        refusing = service(suspend_after=2)
        return [(await refusing.localize(images(1, first=number)))[0].outcome for number in range(5)]

    assert asyncio.run(asked()) == ["error"] * 5


def test_those_who_only_wait_for_their_turn_say_nothing_of_it_either(counting: Counting) -> None:
    counting.seconds = 0.15

    async def asked() -> list[set[str]]:
        busy = service(max_running=1, timeout_s=0.2, suspend_after=2)
        requests = [busy.localize(images(1, first=number)) for number in range(6)]
        found = await asyncio.gather(*requests)
        last = await busy.localize(images(1, first=50))
        return [{one.outcome for batch in found for one in batch}, {last[0].outcome}]

    together, last = asyncio.run(asked())
    assert together == {"region", "timeout"}
    assert last == {"region"}


NO_QUESTION = RegionQuery(as_picture(Image.new("RGB", (8, 8))), None)


def gone(asked: LocalizationService, queries: list[RegionQuery]) -> Any:
    """A client that hangs up while the localizer is asked."""

    async def ask() -> None:
        task = asyncio.ensure_future(asked.localize(queries))
        await asyncio.sleep(0.005)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return ask()


@pytest.mark.parametrize(
    "before",
    [
        lambda asked: asked.localize([NO_QUESTION]),
        lambda asked: asked.localize(images(1)),
        lambda asked: gone(asked, images(1, first=50)),
    ],
    ids=["without a question", "known", "hung up"],
)
def test_who_finds_nothing_out_does_not_keep_a_localizer_suspended(counting: Counting, before: Any) -> None:
    async def ask() -> list[str]:
        asked = service(suspend_after=2, suspend_s=0.05)
        await asked.localize(images(1))
        counting.error = LocalizerError("away")
        outcomes = [(await asked.localize(images(1, first=number)))[0].outcome for number in (10, 11, 12)]
        counting.error = None
        await asyncio.sleep(0.06)
        await before(asked)
        outcomes += [one.outcome for one in await asked.localize(images(1, first=20))]
        return outcomes

    assert asyncio.run(ask()) == ["error", "error", "suspended", "region"]
