# SPDX-License-Identifier: Apache-2.0
"""Images that are processed while their regions are sought: once, for few requests at a time."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_crop.models.ahead import MOST, ImagesAhead

IMAGES = [object()]


class Queue:
    """Work that is run when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.processed: list[Any] = []

    def process(self, images: Any) -> str:
        self.processed.append(images)
        return "pixels"

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def ahead(self, images: Any = IMAGES) -> ImagesAhead:
        return ImagesAhead(images, self.process, self.waiting.append)


def test_what_was_made_is_taken_once() -> None:
    queue = Queue()
    with queue.ahead() as ahead:
        ahead.start()
        ahead.start()
        assert ahead.take(1) is None  # not made yet
        queue.run()
        assert ahead.take(1) == "pixels"
        assert ahead.take(1) is None
    assert queue.processed == [IMAGES]


@pytest.mark.parametrize("others", [[object()], [*IMAGES, object()], []])
def test_it_knows_its_images(others: list[Any]) -> None:
    queue = Queue()
    with queue.ahead() as ahead:
        assert ahead.is_of(IMAGES)
        assert not ahead.is_of(others)
        ahead.start()
        queue.run()
        assert ahead.take(2) is None
        assert ahead.take(1) == "pixels"


def test_few_are_under_way_at_once() -> None:
    queue = Queue()
    many = [queue.ahead() for _ in range(MOST + 2)]
    for one in many:
        one.start()
    assert len(queue.waiting) == MOST
    queue.run()
    many[0].__exit__(None, None, None)
    many[-1].start()
    assert len(queue.waiting) == 1
    for one in many[1:]:
        one.__exit__(None, None, None)
    assert len(queue.processed) == MOST
    queue.run()  # too late: its request is over
    assert len(queue.processed) == MOST
    with queue.ahead() as ahead:  # all places are free again
        ahead.start()
        assert len(queue.waiting) == 1


def test_who_is_over_starts_nothing() -> None:
    queue = Queue()
    ahead = queue.ahead()
    with ahead:
        pass
    ahead.start()
    assert not queue.waiting


def test_what_fails_is_left_to_the_request_itself() -> None:
    queue = Queue()

    def fails(images: Any) -> Any:
        raise ValueError("not an image")

    with ImagesAhead(IMAGES, fails, queue.waiting.append) as ahead:
        ahead.start()
        queue.run()
        assert ahead.take(1) is None


def test_of_several_images_some_may_be_known_already() -> None:
    queue = Queue()
    with queue.ahead([object(), object()]) as ahead:
        ahead.start()
        assert not queue.waiting
