# SPDX-License-Identifier: Apache-2.0
"""What a shadow check draws, holds, runs and compares; with an engine that counts."""

import asyncio
import functools
import math
from collections.abc import Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from prometheus_client import REGISTRY

from vllm_crop.config import ShadowConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.frontend.request_context import FACTS, ImageFacts, RequestContext, current_request
from vllm_crop.frontend.shadow import LAST, FirstToken, ShadowChecks, nats_lost
from vllm_crop.models.processor import AHEAD_KEY, CROP_KEY, REQUEST_KEY
from vllm_crop.planning.geometry import Region
from vllm_crop.request import CropRequest

PRUNED = ImageFacts(576, 64, 64.0, Region.whole(), "request")
WHOLE = ImageFacts(576, 576, 576.0, None, "none")
ASKED = CropRequest(CropParams(regions=[Region.whole()]), salt="tenant")


def output(token_id: int, logprobs: Mapping[int, float]) -> Any:
    """An engine's output, as far as it is read."""
    places = [{token: SimpleNamespace(logprob=one) for token, one in logprobs.items()}]
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token_id], logprobs=places)])


class Served:
    """A renderer and an engine that keep what they are given; unpruned prompts are answered with token 1."""

    def __init__(self, max_model_len: int = 2048) -> None:
        self.model_config = SimpleNamespace(
            served_model_name=f"served-{id(self)}", max_logprobs=20, max_model_len=max_model_len
        )
        self.config = SimpleNamespace(scheduler_config=SimpleNamespace(policy="priority"))
        self.serving_models = SimpleNamespace(lora_requests={"adapter": "the adapter"})
        self.mm_processor_cache = SimpleNamespace(invalidate=self._invalidate)
        self.rendered: list[Any] = []
        self.asked: list[Any] = []
        self.forgotten: list[str] = []
        self.running = self.most = 0
        self.seconds = 0.005
        self.error: Exception | None = None
        self.reaches_engine = True

    def _invalidate(self, mm_hash: str) -> None:
        self.forgotten.append(mm_hash)

    async def process_for_engine_async(self, prompt: Any, arrival_time: float) -> Any:
        assert current_request.get() is None
        self.rendered.append(prompt)
        return {
            "type": "multimodal",
            "prompt_token_ids": [0] * 600,
            "mm_kwargs": {"image": ["data"]},
            "mm_hashes": {"image": ["hash"]},
            "off": prompt["mm_processor_kwargs"][REQUEST_KEY].params.method == "off",
        }

    async def generate(self, prompt: Any, sampling: Any, options: Mapping[str, Any]) -> Any:
        self.asked.append((prompt, sampling, options))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        if self.reaches_engine:
            prompt["crop_servers_own"].clear()
        return output(1, {1: -0.1, 2: -2.0}) if prompt["off"] else output(2, {2: -0.2, 1: -1.1})

    def checks(self, draw: Callable[[], float] = lambda: 0.0, **settings: Any) -> ShadowChecks:
        engine: Any = self
        return ShadowChecks(self, engine, ShadowConfig(**{"rate": 1.0, **settings}), draw)

    def counted(self, outcome: str) -> float:
        labels = {"model_name": self.model_config.served_model_name, "outcome": outcome}
        return REGISTRY.get_sample_value("crop:shadow_checks_total", labels) or 0.0


def prompt(**more: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": [1, 2, 3],
        "multi_modal_data": {"image": [Image.new("RGB", (56, 56))]},
        "multi_modal_uuids": {"image": ["a name"]},
        "mm_processor_kwargs": {REQUEST_KEY: ASKED, AHEAD_KEY: object(), "do_pad": True},
        "cache_salt": "tenant",
        **more,
    }


def consider(checks: ShadowChecks, facts: Any = (PRUNED,), given: Any = None, **more: Any) -> RequestContext:
    """A request that has been rendered."""
    context = RequestContext(**{"model_name": "served", **more})
    engine_input = {FACTS: list(facts), "prompt_token_ids": [0] * 100}
    checks.consider(prompt() if given is None else given, ASKED, engine_input, context)
    return context


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


async def settled(checks: ShadowChecks) -> None:
    while checks._tasks:
        await asyncio.gather(*checks._tasks, return_exceptions=True)
        await asyncio.sleep(0)
    assert checks._held == 0


@pytest.mark.parametrize(
    ("unpruned", "pruned", "lost"),
    [
        ((1, {1: -0.1, 2: -3.0}), (1, {1: -0.1, 2: -3.0}), 0.0),
        ((1, {1: -0.1, 2: -3.0}), (1, {1: -0.6, 2: -1.0}), 0.5),
        ((1, {1: -0.5, 2: -1.0}), (1, {1: -0.1, 2: -3.0}), -0.4),
        ((1, {1: -0.1, 2: -3.0}), (2, {2: -0.2, 1: -1.9}), 1.8),
        ((1, {1: -0.1, 2: -3.0}), (2, {2: -0.2, 3: -4.1}), 4.0),  # at least that much
    ],
)
def test_what_pruning_takes_from_the_first_token(unpruned: Any, pruned: Any, lost: float) -> None:
    assert nats_lost(FirstToken(*unpruned), FirstToken(*pruned)) == pytest.approx(lost)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_what_is_no_number_is_not_compared(logprob: float) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        nats_lost(FirstToken(1, {1: -0.1}), FirstToken(2, {2: -0.1, 1: logprob}))


def test_a_first_token_is_read_from_an_output() -> None:
    assert FirstToken.of(output(7, {7: -0.1, 8: -2.5})) == FirstToken(7, {7: -0.1, 8: -2.5})


@pytest.mark.parametrize(("drawn", "rate", "held"), [(0.0, 0.01, 1), (0.01, 0.01, 0), (0.999, 1.0, 1)])
def test_the_rate_is_the_share_that_is_drawn(drawn: float, rate: float, held: int) -> None:
    assert len(consider(Served().checks(lambda: drawn, rate=rate)).afterwards) == held


@pytest.mark.parametrize(
    "odd",
    [
        {"facts": ()},
        {"facts": (WHOLE,)},
        {"model_name": None},  # only counted
        {"request": SimpleNamespace(truncate_prompt_tokens=5)},
        {"given": prompt(multi_modal_data={"image": [None]})},  # a name alone
    ],
    ids=str,
)
def test_what_is_not_pruned_or_cannot_be_asked_again_is_not_drawn(odd: dict[str, Any]) -> None:
    served = Served()
    assert not consider(served.checks(), **odd).afterwards
    assert not any(served.counted(one) for one in ("compared", "dropped", "too_long", "failed"))


@in_a_loop
async def test_a_check_asks_unpruned_and_pruned_when_all_is_answered() -> None:
    served = Served()
    checks = served.checks()
    context = consider(checks, request=SimpleNamespace(model="adapter"))
    current_request.set(context)
    await asyncio.sleep(0.02)
    assert not served.asked
    context.over(answered=True)
    await settled(checks)
    assert [one["mm_processor_kwargs"][REQUEST_KEY].params.method for one in served.rendered] == ["off", None]
    for one in served.rendered:
        assert set(one["mm_processor_kwargs"]) == {REQUEST_KEY, "do_pad"}
        assert CROP_KEY not in one["mm_processor_kwargs"]
        assert "multi_modal_uuids" not in one
        assert one["cache_salt"] == "tenant"
        request = one["mm_processor_kwargs"][REQUEST_KEY]
        assert (request.limited, request.salt) == (False, "tenant")
    for _, sampling, options in served.asked:
        assert (sampling.max_tokens, sampling.temperature, sampling.logprobs) == (1, 0.0, 20)
        assert (options["priority"], options["lora_request"]) == (LAST, "the adapter")
    assert not served.forgotten
    assert served.counted("compared") == 1
    labels = {"model_name": served.model_config.served_model_name}
    lost = REGISTRY.get_sample_value("crop:shadow_logprob_lost_nats_sum", labels)
    assert lost == pytest.approx(1.0)
    different = {**labels, "agreement": "different"}
    assert REGISTRY.get_sample_value("crop:shadow_first_tokens_total", different) == 1


@in_a_loop
async def test_what_is_not_answered_in_full_is_not_checked() -> None:
    served = Served()
    checks = served.checks(max_held=1)
    for _ in range(3):
        consider(checks).over(answered=False)
    await settled(checks)
    assert not served.asked
    assert served.counted("dropped") == 0


@in_a_loop
async def test_no_more_are_held_and_run_than_allowed() -> None:
    served = Served()
    checks = served.checks(max_held=3, max_running=2)
    for context in [consider(checks) for _ in range(10)]:
        context.over(answered=True)
    await settled(checks)
    assert (served.most, len(served.asked)) == (2, 6)
    assert (served.counted("compared"), served.counted("dropped")) == (3, 7)
    consider(checks).over(answered=True)
    await settled(checks)
    assert served.counted("compared") == 4


@in_a_loop
async def test_what_the_model_cannot_take_unpruned_is_counted_and_not_asked() -> None:
    served = Served(max_model_len=100 + 512)
    assert not consider(served.checks()).afterwards
    assert served.counted("too_long") == 1
    assert consider(Served(max_model_len=100 + 513).checks()).afterwards


@in_a_loop
async def test_an_engine_that_is_slow_or_fails_is_counted_and_its_items_forgotten() -> None:
    served = Served()
    checks = served.checks(timeout_s=0.01)
    served.seconds = 5.0
    consider(checks).over(answered=True)
    await settled(checks)
    assert served.counted("timeout") == 1
    assert served.forgotten == ["hash"]
    served.seconds, served.error = 0.0, RuntimeError("gone")
    consider(checks).over(answered=True)
    await settled(checks)
    assert served.counted("failed") == 1
    assert served.counted("compared") == 0


@in_a_loop
async def test_a_stopped_server_leaves_no_check_behind() -> None:
    served = Served()
    checks = served.checks()
    served.seconds = 60.0
    for context in [consider(checks) for _ in range(3)]:
        context.over(answered=True)
    await asyncio.sleep(0.01)
    assert served.running == 1
    checks.stop()
    await settled(checks)
    assert served.running == 0


def test_nothing_it_stumbles_over_reaches_the_request() -> None:
    served = Served()

    def broken() -> float:
        raise RuntimeError("no dice")

    checks = served.checks(broken)
    assert not consider(checks).afterwards
    assert served.counted("failed") == 1
    checks = served.checks()
    consider(checks).over(answered=True)  # without an event loop
    assert served.counted("failed") == 2
    assert checks._held == 0
