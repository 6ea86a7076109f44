# SPDX-License-Identifier: Apache-2.0
"""A localizer that fails costs little: nobody waits for it for long, and the log stays readable."""

import logging

import pytest

from vllm_crop.localizers.failures import CircuitBreaker, ThrottledLog


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = CircuitBreaker(3, 10.0, Clock())
    for _ in range(5):
        assert [breaker.failed(), breaker.failed()] == [False, False]
        assert breaker.admits()
        assert not breaker.succeeded()
    assert [breaker.failed() for _ in range(4)] == [False, False, True, False]
    assert breaker.is_open
    assert not breaker.admits()


def test_an_open_breaker_lets_one_request_try_now_and_then() -> None:
    clock = Clock()
    breaker = CircuitBreaker(1, 10.0, clock)
    assert breaker.failed()
    clock.now += 9.9
    assert not breaker.admits()
    clock.now += 0.2
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    assert not breaker.failed()  # the one that tried
    clock.now += 9.9
    assert not breaker.admits()
    clock.now += 0.2
    assert breaker.admits()
    assert breaker.succeeded()
    assert all(breaker.admits() for _ in range(3))


def test_a_try_that_goes_away_does_not_leave_the_breaker_open_for_ever() -> None:
    clock = Clock()
    breaker = CircuitBreaker(1, 10.0, clock)
    breaker.failed()
    for _ in range(3):  # each client gives up before it has an answer
        clock.now += 10
        assert breaker.admits()
    assert breaker.is_open


def test_lines_of_a_kind_are_counted_and_not_written(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = ThrottledLog(logging.getLogger("throttled"), 10.0, clock)
    with caplog.at_level(logging.WARNING, "throttled"):
        for number in range(50):
            log.warning("timeout", "no answer to %s", number)
        log.warning("error", "other kinds are lines of their own")
        clock.now += 10
        log.warning("timeout", "no answer to %s", "the last")
    assert caplog.messages == [
        "no answer to 0",
        "other kinds are lines of their own",
        "no answer to the last (49 more since the last line)",
    ]
