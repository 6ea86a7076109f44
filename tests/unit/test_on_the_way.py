# SPDX-License-Identifier: Apache-2.0
"""Whoever comes second makes vLLM's cache forget what was given up on its way to the engine."""

from vllm_crop.models.sent import OnTheWay


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
