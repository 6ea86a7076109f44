# SPDX-License-Identifier: Apache-2.0
"""Eviction where layers have a state: it is that of the tokens that stayed, whatever the scheduler does.

States and convolutions are filled with something before each test: a request that continued what a block held
before would be noticed.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import float32_deltanet
from tests.conftest import CheckpointOf
from tests.cpu.conftest import Engine, Question, ReferenceFor, ReferenceOf
from tests.cpu.test_eviction_scheduling import answer_some, check, first_run, pool_of, step_through
from tests.cpu.test_parity import NOTICEABLE, cells, difference
from tests.families import QWEN3_5
from tests.pictures import noise_image
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.eviction.layers import state_of

pytestmark = pytest.mark.vllm_runtime

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
EVICT = {"method": "ilp", "eviction_layers": [4], "pruning_rate": 0.4}
LAST = cells(6, 6, 7, 7)
# No token stands before the image, as its placeholder is written without what begins one.
IMAGE_FIRST = "<|image_pad|>?"
STALE = 9.0


@pytest.fixture(scope="module")
def started(checkpoint_of: CheckpointOf) -> Engine:
    """Layers 4, 5, 6 have a state and run without evicted tokens, 7 looks."""
    checkpoint = checkpoint_of(QWEN3_5, QWEN3_5.deep)
    return Engine(checkpoint, EVICT, QWEN3_5, max_num_batched_tokens=256, num_gpu_blocks_override=60)


@pytest.fixture
def engine(started: Engine) -> Iterator[Engine]:
    for state in states(started):
        state.fill_(STALE)
    num_free = started.block_pool.get_num_free_blocks()
    yield started
    assert started.block_pool.get_num_free_blocks() == num_free


@pytest.fixture
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    return reference_of(QWEN3_5, "evicting")


def states(engine: Engine) -> list[torch.Tensor]:
    layers = engine.model.language_model.model.layers
    return [state for layer in layers if (found := state_of(layer)) for state in found.kv_cache]


def image_first(seed: int) -> Question:
    """Of the first row of the image at least all tokens are evicted."""
    return Question((noise_image(seed, 500, 400),), {"regions": [LAST], "pruning_rate": 0.49}, IMAGE_FIRST)


def usual(seed: int, **crop: Any) -> Question:
    return Question((noise_image(seed, 500, 400),), {"regions": [cells(2, 3, 3, 4)], **crop})


def test_a_state_begins_with_the_first_token_that_stays(
    engine: Engine, reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first chunks no token stays, while another request decodes; then one does."""
    other, asked = usual(901, method="off"), image_first(900)
    answers = {}
    for continues in (False, True):
        if continues:
            monkeypatch.setattr(float32_deltanet, "_run", as_if_continued)
        other_id = engine.add("other", other, steps=24)
        answer_some(engine, other_id, 1)
        asked_id = engine.add("asked", asked)
        evicted = engine.scheduler.evictions[asked_id]
        begin, end = first_run(engine, asked_id, stage=1)
        assert evicted.num_kept(1, end) == begin == 0
        step_through(engine, asked_id, [end // 2, end - 1, end, end + 1])
        answers[continues] = engine.finish()
    check(answers[False]["asked"], reference_for(asked, engine.config))
    check(answers[False]["other"], reference_for(other, engine.config, steps=24))
    assert difference(answers[True]["asked"], reference_for(asked, engine.config)) > NOTICEABLE


def as_if_continued(layer: Any, metadata: Any, *args: Any) -> None:
    """The mistake: who has computed tokens before goes on with a state."""
    begun = metadata.has_initial_state
    if begun is not None and layer.prefix.split(".")[-2] in ("4", "5", "6"):
        metadata = replace(metadata, has_initial_state=torch.ones_like(begun))
    run(layer, metadata, *args)


run = float32_deltanet._run


@pytest.mark.parametrize("asked", [image_first(902), usual(903)], ids=["image first", "text first"])
def test_chunks_of_one_token_each(engine: Engine, reference_for: ReferenceFor, asked: Question) -> None:
    """Past tokens that leave and the first ones that stay; V2 takes such chunks for decoding."""
    asked_id = engine.add("asked", asked)
    begin, end = first_run(engine, asked_id, stage=1)
    step_through(engine, asked_id, [begin + 1, begin + 2, begin + 3, *range(end - 2, end + 4)])
    check(engine.finish()["asked"], reference_for(asked, engine.config))


@pytest.mark.skipif(not ON_V2, reason="only the V2 runner has graphs")
@pytest.mark.parametrize("asked", [image_first(904), usual(905)], ids=["image first", "text first"])
def test_tokens_that_stay_in_a_captured_step(
    engine: Engine, reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch, asked: Question
) -> None:
    """A step of one token each replays a decode graph, which drops no row and begins no state."""
    from vllm.config import CUDAGraphMode

    from vllm_crop.runners.v2 import CropModelState

    prepare, replayed = CropModelState.prepare_attn, []

    def as_in_a_graph(self: Any, batch: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
        eligible = batch.num_scheduled_tokens.max() == 1 and batch.num_computed_tokens_np.min() > 0
        replayed.append(bool(eligible))
        return prepare(self, batch, CUDAGraphMode.FULL if eligible else mode, *args, **kwargs)

    monkeypatch.setattr(CropModelState, "prepare_attn", as_in_a_graph)
    other = usual(906)
    other_id = engine.add("other", other, steps=40)
    answer_some(engine, other_id, 1)
    asked_id = engine.add("asked", asked, steps=4)
    begin, end = first_run(engine, asked_id, stage=1)
    step_through(engine, asked_id, [begin + 1, begin + 2, begin + 3, *range(end - 2, end + 4)])
    answers = engine.finish()
    assert sum(replayed) > 10
    check(answers["asked"], reference_for(asked, engine.config, steps=4))
    check(answers["other"], reference_for(other, engine.config, steps=40))


def test_preemption_and_resumption(
    engine: Engine, reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool for three prompts, but not for an answer; a state is computed anew with what was answered."""
    images = tuple(noise_image(910 + index, width, 420) for index, width in enumerate((500, 300, 300)))
    long = Question(images, {"regions": [cells(2, 3, 3, 4)] * 3})
    questions = {"beside": usual(913), "first": replace(long, text="{images}Who?"), "second": long}
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    num_prompt = reference_for(long, engine.config, steps=1).num_prompt_tokens
    assert 0 < block - num_prompt < 80
    steps = dict.fromkeys(questions, block - num_prompt + 6) | {"beside": 100}
    preempted: list[tuple[str, int]] = []
    preempt = engine.scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append((request.request_id, request.num_output_tokens))
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", watched)
    with pool_of(engine, 3 * 8):
        for name, question in questions.items():
            engine.add(name, question, steps=steps[name])
        answers = engine.finish()
    print(f"block {block}, prompt {num_prompt}, preempted after so many tokens: {preempted}")
    assert any(name.startswith("second") and num_tokens > 1 for name, num_tokens in preempted)
    for name, question in questions.items():
        check(answers[name], reference_for(question, engine.config, steps=steps[name]))


@pytest.mark.parametrize("method", ["off", "ilp"])
def test_keys_and_values_of_kept_tokens_and_one_block_for_each_state(engine: Engine, method: str) -> None:
    images = tuple(noise_image(920 + index, 500, 400) for index in range(4))
    asked = Question(images, {"regions": [LAST] * 4, "method": method})
    request_id = engine.add("measured", asked, steps=2)
    request, evictions = engine.scheduler.requests[request_id], engine.scheduler.evictions
    while request.num_computed_tokens < request.num_prompt_tokens:
        engine.step()
    eviction = evictions.get(request_id)
    tokens = [eviction.num_kept(stage, request.num_prompt_tokens) for stage in (0, 1)] if eviction else None
    tokens = tokens or [request.num_prompt_tokens] * 2
    coordinator = engine.scheduler.kv_cache_manager.coordinator
    blocks = [len(group) for group in coordinator.get_blocks(request_id)]
    config = engine.scheduler.kv_cache_config
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    grouping = predict_grouping(8, (4,), block, QWEN3_5.looking)
    stages = [group.stage for group in grouping.groups]
    assert stages == [0, 0, 0, 0, 1, 1, 1, 1]
    assert stages == [getattr(group.kv_cache_spec, "stage", 0) for group in config.kv_cache_groups]
    needed = [1 if group.has_state else math.ceil(tokens[group.stage] / block) for group in grouping.groups]
    assert blocks == needed
    assert sum(blocks) == (10 if method == "off" else 9)
    assert grouping.layer_tokens(tokens) == sum(blocks) * block
    engine.finish()
