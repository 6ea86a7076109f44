# SPDX-License-Identifier: Apache-2.0
"""Hundreds of mixed requests on engines with eviction whose KV pool is too small for them.

They come at random, share prefixes, are preempted and aborted, and take over each other's ids. Images come
under names (`uuid`) that move from one to another, or as a name alone; in between come requests that are
refused, for what they ask or after their images have been processed. SOAK_REQUESTS sets how many are
answered, over all configurations.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.cpu.conftest import Engine, ReferenceFor, _answer
from tests.pictures import noise_image
from tests.soak_requests import LONGEST_ANSWER, Fate, Load, SoakRequest

pytestmark = pytest.mark.vllm_runtime

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # its kernels are interpreted: ~0.3 s a step
NUM_REQUESTS = int(os.environ.get("SOAK_REQUESTS", "32" if ON_V2 else "120"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
TOLERANCE = 2e-5  # nats, over the full vocabulary; up to 24 tokens, a few more than elsewhere
NUM_QUESTIONS = 40  # per configuration; every one is answered once by the reference
IDS = [f"request-{index}" for index in range(20)]  # few, so that ids soon come back
MOST_LIVE = 18

NAMES = [f"name-{index}" for index in range(4)]
REFUSED = {
    "one name for two": "stands for two different images",
    "a name nobody knows": "data is not provided",
    "a region too many": r"crop\.regions",
    "too long": "maximum context length",
    "bad parameters": "logprobs",
    "logprobs of evicted tokens": "prompt_logprobs: not possible",
}
EVICTED = {"method": "ilp", "pruning_rate": 0.5}
STAGED = {"method": "plc+ilp", "eviction_layers": [2, 5], "compression": "prune", "position_ids": "original"}
# Pools hold the largest request, two unpruned images, and little more.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one stage": (
        {"method": "ilp", "eviction_layers": [2], "pruning_rate": 2 / 3},
        {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 162},
    ),
    "two stages": (
        {**STAGED, "pruning_rate": 2 / 3},
        {"max_num_batched_tokens": 512, "num_gpu_blocks_override": 202, "enable_prefix_caching": True},
    ),
    "no prefix caching": (
        {"method": "ilp", "eviction_layers": [2], "pruning_rate": 0.5},
        {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 162, "enable_prefix_caching": False},
    ),
}


class KVWatch:
    """Looks at the KV blocks of every step, after it has been scheduled and before it runs."""

    def __init__(self, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scheduler = scheduler
        self.managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = scheduler.kv_cache_manager.block_pool
        self.num_free = self.pool.get_num_free_blocks()
        self.counts: Counter[str] = Counter()
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.check(output)
            return output

        monkeypatch.setattr(scheduler, "schedule", watched)

    def check(self, output: Any) -> None:
        """Assert what eviction.md, section 10, says of blocks; count what the step is an example of."""
        self.check_owners()
        slots, drops = [], False
        for request in self.scheduler.running:
            scheduled = output.num_scheduled_tokens.get(request.request_id, 0)
            for manager in self.managers:
                kept = self.num_kept(request, getattr(manager, "stage", 0))
                computed = request.num_computed_tokens
                before, after = kept(computed - scheduled), kept(computed)
                slots.append(self.check_request(manager, request.request_id, before, after))
                drops |= after - before < scheduled
        written = np.concatenate([*slots, np.empty(0, dtype=np.int64)])
        assert len(np.unique(written)) == len(written), "a slot is written twice in one step"
        self.counts["preemptions"] += len(output.preempted_req_ids or ())
        if output.total_num_scheduled_tokens:
            self.counts["evicting steps" if drops else "other steps"] += 1
        self.counts["copies"] += len(output.kv_cache_block_copies or ())

    def check_owners(self) -> None:
        """Blocks belong to running requests only, and nothing else holds or loses a reference."""
        running = {request.request_id for request in self.scheduler.running}
        holders: Counter[int] = Counter()
        for manager in self.managers:
            holding = {req_id for req_id, blocks in manager.req_to_blocks.items() if blocks}
            assert holding <= running  # without a block: only evicted tokens have been computed
            held = Counter(block.block_id for blocks in manager.req_to_blocks.values() for block in blocks)
            assert not held.keys() & holders.keys(), "two KV cache groups share a block"
            holders |= held
        for block in self.pool.blocks:
            assert block.ref_cnt == holders[block.block_id] or block.is_null
        assert self.pool.get_num_free_blocks() == self.num_free - len(holders)

    def check_request(self, manager: Any, req_id: str, before: int, after: int) -> np.ndarray[Any, Any]:
        """Assert that a request has the blocks for `after` entries; the slots of those from `before` on."""
        blocks, size = manager.req_to_blocks[req_id], manager.block_size
        assert len(blocks) == -(-after // size)
        assert after % size == 0 or blocks[-1].ref_cnt == 1, "a partly filled block has two owners"
        entries = np.arange(before, after)
        block_ids = np.array([block.block_id for block in blocks], dtype=np.int64)
        return block_ids[entries // size] * size + entries % size

    def num_kept(self, request: Any, stage: int) -> Any:
        """Counts a stage's KV entries from the prompt's markers, which no text of these prompts contains."""
        markers = self.scheduler.eviction_settings.marker_ids[:stage]
        gone = np.cumsum(np.isin(request.prompt_token_ids, markers))
        return lambda num_tokens: num_tokens - int(gone[min(num_tokens, len(gone)) - 1] if num_tokens else 0)

    def check_nothing_left(self) -> None:
        """Assert that all requests have gone, and their blocks with them."""
        scheduler = self.scheduler
        assert not scheduler.requests
        assert not scheduler.running
        assert (
            not len(scheduler.waiting) + len(scheduler.kv_holding_waiting) + len(scheduler.deferred_waiting)
        )
        assert not scheduler.finished_req_ids
        assert not list(scheduler.evictions.items())
        assert self.pool.get_num_free_blocks() == self.num_free
        for manager in self.managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block
            assert not manager._partial_hit_reqs
            assert not manager._pending_cow_copies
            assert not getattr(manager, "_num_published", None)
            assert not getattr(manager, "_new_tails", None)


class Soak:
    """One configuration's load: adds, aborts, steps, and compares every answer."""

    def __init__(self, engine: Engine, watch: KVWatch, reference_for: ReferenceFor, rng: Random) -> None:
        self.engine, self.watch, self.reference_for, self.rng = engine, watch, reference_for, rng
        self.core = engine.llm.llm_engine
        self.scheduler = engine.scheduler
        self.load = Load(rng, NUM_QUESTIONS)
        self.live: dict[str, SoakRequest] = {}
        self.hostile = Random(f"{rng.random()}")
        self.named: dict[str, Any] = {}  # the image last sent with each name
        self.counts = watch.counts
        self.worst = 0.0

    def run(self, num_requests: int) -> None:
        """Until all have been answered or aborted."""
        while self.counts["requests"] < num_requests or self.live:
            self.abort_some()
            if self.hostile.random() < 0.06:
                self.add_one_that_is_refused()
            if self.counts["requests"] < num_requests:
                self.add_some()
                self.abort_some()  # before their first step
            for output in self.core.step():
                self.check_answer(output)
        while self.core.engine_core.engine_core.scheduler.has_requests():
            self.core.step()  # the worker hears of the last ones
        self.watch.check_nothing_left()
        check_worker_is_empty(self.engine)

    def add_some(self) -> None:
        """Mostly none or one, now and then as many as may live at once."""
        wanted = self.rng.choices((0, 1, 2, MOST_LIVE), weights=(40, 35, 15, 10))[0]
        for _ in range(min(wanted, MOST_LIVE - len(self.live))):
            req_id = self.rng.choice([req_id for req_id in IDS if req_id not in self.live])
            asked = self.load.next()
            self.add(req_id, asked)
            self.counts["requests"] += 1
            if self.counts["requests"] % 50 == 0:
                print(self.report(), flush=True)

    def add(self, req_id: str, asked: SoakRequest) -> None:
        """As `LLM.generate` does, but with an id of ours."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=asked.num_tokens,
            logprobs=-1,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = self.engine.llm._preprocess_cmpl_one(self.with_names(asked.question.prompt()))
        assert self.core.add_request(req_id, prompt, sampling) == req_id
        self.live[req_id] = asked

    def with_names(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Half of the images come with a name, some of them as a name alone."""
        images = list(prompt.get("multi_modal_data", {}).get("image", ()))
        names: list[str | None] = [None] * len(images)
        free = list(NAMES)
        for index, image in enumerate(images):
            if self.hostile.random() < 0.5:
                continue
            known = [name for name in free if self.named.get(name) is image]
            names[index] = name = self.hostile.choice(known or free)
            free.remove(name)
            self.named[name] = image
            if known:
                images[index] = None
                self.counts["names alone"] += 1
        if not any(names):
            return prompt
        return {**prompt, "multi_modal_data": {"image": images}, "multi_modal_uuids": {"image": names}}

    def add_one_that_is_refused(self) -> None:
        """Of a question that may be asked again: nothing may be left of it."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        asked = self.hostile.choice([one for one in self.load.catalogue if one.images])
        kind = self.hostile.choice(list(REFUSED))
        prompt, options = asked.prompt(), {}
        crop = prompt["mm_processor_kwargs"]["crop"]
        if kind == "one name for two":
            other = next(
                one for one in self.load.catalogue if one.images and one.images[0] != asked.images[0]
            )
            prompt = replace(asked, images=(asked.images[0], other.images[0])).prompt()
            prompt["mm_processor_kwargs"] = {"crop": {**crop, "regions": [None, None]}}
            prompt["multi_modal_uuids"] = {"image": ["twice", "twice"]}
        elif kind == "a name nobody knows":
            prompt["multi_modal_data"] = {"image": [None] * len(asked.images)}
            prompt["multi_modal_uuids"] = {"image": ["unheard of"] * len(asked.images)}
        elif kind == "a region too many":
            prompt["mm_processor_kwargs"] = {"crop": {**crop, "regions": [None] * 7}}
        elif kind == "too long":
            prompt["prompt"] += " and" * 3000
        elif kind == "bad parameters":
            options = {"logprobs": 10**6}
        else:
            # Of an image that only this request has: it must come with its data afterwards.
            image = noise_image(5000 + self.counts["refused"])
            question = replace(asked, images=(image,), crop={**EVICTED, "regions": [[0.3, 0.3, 0.6, 0.6]]})
            prompt, options = question.prompt(), {"prompt_logprobs": 1}
        sampling = SamplingParams(**{"temperature": 0, "max_tokens": 2, **options})
        with pytest.raises((ValueError, VLLMClientError), match=REFUSED[kind]):
            self.core.add_request("refused", self.engine.llm._preprocess_cmpl_one(prompt), sampling)
        self.counts["refused"] += 1
        self.counts[f"refused: {kind}"] += 1

    def abort_some(self) -> None:
        """Those that have come to the point where they are to be aborted, soon after that."""
        for req_id, asked in list(self.live.items()):
            state = self.state_of(req_id)
            if state == asked.fate and (state == "unstarted" or self.rng.random() < 0.4):
                self.core.abort_request([req_id])
                del self.live[req_id]
                self.counts[f"aborted {state}"] += 1

    def state_of(self, req_id: str) -> Fate:
        request = self.scheduler.requests[req_id]
        if request.num_preemptions and request not in self.scheduler.running:
            return "preempted"
        if not request.num_computed_tokens:
            return "unstarted"
        return "prefilling" if request.num_computed_tokens < request.num_prompt_tokens else "decoding"

    def check_answer(self, output: Any) -> None:
        """Compare with the same request run alone, by the reference."""
        asked = self.live.pop(output.request_id)
        reference = self.reference_for(asked.question, self.engine.config, steps=LONGEST_ANSWER)
        answer = _answer(output)
        where = f"{self.report()}: {output.request_id}, {asked}"
        assert answer.num_prompt_tokens == reference.num_prompt_tokens, where
        assert answer.token_ids == reference.token_ids[: asked.num_tokens], where
        error = float((answer.logprobs - reference.logprobs[: asked.num_tokens]).abs().max())
        assert error <= TOLERANCE, f"{error:.1e}, {where}"
        self.worst = max(self.worst, error)
        self.counts["answers"] += 1
        self.counts["cached tokens"] += answer.num_cached_tokens
        if asked.fate == "finished":
            self.core.abort_request([output.request_id])
            self.counts["aborted finished"] += 1

    def report(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{counts}; max |delta logprob| {self.worst:.1e}"


def check_worker_is_empty(engine: Engine) -> None:
    """Assert that the model runner has forgotten all requests and their evictions."""
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    if ON_V2:
        assert not runner.model_state._slots
        assert not any(runner.model_state.running._evictions)
        assert not runner.model_state.running._ends.any()
        return
    # V1 keeps evictions by row of the batch, and finds out whose the rows are when the batch has changed.
    assert not runner.requests
    assert not runner.input_batch.num_reqs
    assert not runner._row_owners


def keep_request_id(request: Any) -> None:
    """Instead of vLLM's `assign_request_id`, which adds random characters: ids are to be used again."""
    request.external_req_id = request.request_id


def keep_pixels(mm_features: Any, *_: Any, **__: Any) -> Any:
    """Instead of vLLM's `strip_covered_mm_data`, which takes from a request the images it finds cached.

    V1 never gets them back: resumed after a preemption, with the cache gone, such a request ends the engine
    ("Encoder cache miss"; without eviction too). V2 is sent resumed requests anew.
    """
    return mm_features


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """Keeps them: when one is deleted, vLLM may end the process group that all of them share."""
    return []


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_soak(
    name: str,
    deep_checkpoint: Path,
    deep_reference_for: ReferenceFor,
    engines: list[Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crop, options = CONFIGURATIONS[name]
    engine = Engine(deep_checkpoint, crop, max_model_len=1280, **options)
    engines.append(engine)
    if not ON_V2:
        monkeypatch.setattr("vllm.v1.core.sched.output.strip_covered_mm_data", keep_pixels)
    monkeypatch.setattr(engine.llm.llm_engine.input_processor, "assign_request_id", keep_request_id)
    watch = KVWatch(engine.scheduler, monkeypatch)
    soak = Soak(engine, watch, deep_reference_for, Random(f"{SEED} {name}"))
    num_requests = -(-NUM_REQUESTS // len(CONFIGURATIONS))
    soak.run(num_requests)
    print(f"{name}: {soak.report()}")
    counts = soak.counts
    assert counts["preemptions"] >= num_requests // 25
    assert counts["refused"] >= num_requests // 12
    assert counts["names alone"] >= num_requests // 25
    assert counts["aborted prefilling"] + counts["aborted decoding"] >= num_requests // 25
    assert counts["evicting steps"] >= num_requests * 3 // 50
    assert counts["other steps"] >= num_requests * 3 // 50
    assert bool(counts["cached tokens"]) == options.get("enable_prefix_caching", True)
