# SPDX-License-Identifier: Apache-2.0
"""With eviction, the prefix cache gives away all that two prompts share, and nothing of another region."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
import torch
from PIL import Image

from tests.cpu.conftest import Answer, Engine, Question, ReferenceFor, _answer, decided
from tests.cpu.test_caches import right
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.pictures import noise_image
from tests.reference import HfLlava
from vllm_crop.planning.plan import TokenPlan

pytestmark = pytest.mark.vllm_runtime

BLOCK = 32
FIRST, ELSEWHERE = cells(0, 0, 1, 1), cells(2, 3, 3, 4)
# Both far down: their plans begin alike.
LOW, LOW_TOO = cells(6, 6, 7, 7), cells(4, 6, 5, 7)
SHORT = "USER: {images}What?\n"  # 589 tokens with one image
PREAMBLE = "USER: You see a picture and answer briefly. Look closely now. {images}What is it?\nASSISTANT:"
NUM_SHARED_TEXT = PREAMBLE.index("{images}")  # a token is a byte

ENGINES = ["evicting_engine", "staged_engine"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Chunks of 256 tokens and one stage, or whole prompts and two. Its prefix cache is empty."""
    found: Engine = request.getfixturevalue(request.param)
    assert found.llm.reset_prefix_cache()
    return found


@pytest.fixture
def fresh(request: pytest.FixtureRequest) -> Image.Image:
    """A picture that no other test has used."""
    return noise_image(crc32(request.node.nodeid.encode()))


def about(
    image: Image.Image, region: list[list[float]] | None, text: str = SHORT, method: str = "ilp"
) -> Question:
    return Question((image,), {"regions": [region], "method": method}, text)


def whole_blocks(num_tokens: int) -> int:
    return num_tokens // BLOCK * BLOCK


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def expected_hit(before: Answer, after: Answer) -> int:
    """What `after` can take from `before`: the last token of a prompt is always computed."""
    known = before.prompt_token_ids + before.token_ids[:-1]
    return whole_blocks(min(num_common(known, after.prompt_token_ids), after.num_prompt_tokens - 1))


@pytest.mark.parametrize("method", ["ilp", "plc+ilp"])
def test_a_resend_hits_all_but_the_last_block(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image, method: str
) -> None:
    asked = about(fresh, ELSEWHERE, method=method)
    (sent,) = right(engine, deep_reference_for, asked)
    (again,) = right(engine, deep_reference_for, asked)
    (once_more,) = right(engine, deep_reference_for, asked)
    assert sent.num_cached_tokens == 0
    assert again.num_cached_tokens == once_more.num_cached_tokens == whole_blocks(sent.num_prompt_tokens - 1)
    if method == "ilp":
        assert (again.num_prompt_tokens, again.num_cached_tokens) == (589, 576)


def test_a_new_question_hits_the_whole_image(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    right(engine, deep_reference_for, about(fresh, ELSEWHERE))
    for text in ("USER: {images}Who?\nASSISTANT:", "USER: {images}Is it late?\nASSISTANT:"):
        (answer,) = right(engine, deep_reference_for, about(fresh, ELSEWHERE, text))
        assert answer.num_cached_tokens == 576  # the image ends at 582


@pytest.mark.parametrize(
    ("regions", "least"),
    [([LOW, LOW_TOO], 384), ([LOW_TOO, LOW], 384), ([FIRST, LOW], 0)],
    ids=["alike at first", "the other way round", "different at once"],
)
def test_another_region_hits_the_common_prefix_only(
    engine: Engine,
    deep_reference_for: ReferenceFor,
    fresh: Image.Image,
    regions: list[list[list[float]]],
    least: int,
) -> None:
    # A rim moves the far groups too: plans of two regions begin to differ earlier.
    first, second = (
        replace(question, crop={**question.crop, "rim": 0})
        for question in (about(fresh, region) for region in regions)
    )
    (before,) = right(engine, deep_reference_for, first)
    (after,) = right(engine, deep_reference_for, second)
    assert after.num_cached_tokens == expected_hit(before, after) >= least
    assert after.num_cached_tokens < 576
    (first_again,) = right(engine, deep_reference_for, first)
    assert first_again.num_cached_tokens == 576


@pytest.mark.parametrize("pruned_first", [True, False])
def test_pruned_and_unpruned_share_the_common_prefix_only(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image, pruned_first: bool
) -> None:
    """Which ends within the image, after tokens that stay in all layers."""
    questions = [about(fresh, FIRST, PREAMBLE), about(fresh, None, PREAMBLE)]
    if not pruned_first:
        questions.reverse()
    (before,), (after,) = (right(engine, deep_reference_for, question) for question in questions)
    assert before.num_cached_tokens == 0
    assert after.num_cached_tokens == expected_hit(before, after) == whole_blocks(NUM_SHARED_TEXT + 6)
    assert after.num_cached_tokens > NUM_SHARED_TEXT


def test_methods_share_the_text_before_the_image_only(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    """Compressed embeddings are others, whatever their place in the prompt."""
    text_only = Question(text=PREAMBLE)
    (before,) = right(engine, deep_reference_for, about(fresh, FIRST, PREAMBLE, "ilp"))
    for method in ("plc+ilp", "plc"):
        (after,) = right(engine, deep_reference_for, about(fresh, FIRST, PREAMBLE, method))
        assert after.num_cached_tokens == whole_blocks(NUM_SHARED_TEXT) < expected_hit(before, after)
    (text,) = right(engine, deep_reference_for, text_only)
    assert text.num_cached_tokens == whole_blocks(NUM_SHARED_TEXT)


def test_twins_in_one_batch(engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image) -> None:
    """What a step computes is for later steps only: neither may read blocks the other has yet to write."""
    asked, other = about(fresh, ELSEWHERE), about(fresh, LOW)
    right(engine, deep_reference_for, asked, asked, other, asked, other)
    for answer in right(engine, deep_reference_for, asked, other, asked):
        assert answer.num_cached_tokens == 576


def test_a_cached_tail_is_never_overwritten(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    """Everyone who continues the partly filled block that the image ends in gets a copy."""
    asked = about(fresh, ELSEWHERE)
    others = [replace(asked, text=f"USER: {{images}}{word}?\n") for word in ("Who", "Where to", "Why")]
    right(engine, deep_reference_for, asked)
    right(engine, deep_reference_for, others[0])
    right(engine, deep_reference_for, asked, *others[1:], asked)
    for answer in right(engine, deep_reference_for, *others, asked):
        assert answer.num_cached_tokens == 576


def test_an_answer_of_one_token_leaves_as_much_in_the_cache(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    """As yes-or-no questions do, and requests that only warm up the cache."""
    asked = about(fresh, ELSEWHERE)
    engine.ask(asked, steps=1)
    (answer,) = engine.ask(asked, steps=1)
    assert difference(answer, deep_reference_for(asked, engine.config, steps=1)) <= TOLERANCE
    assert answer.num_cached_tokens == 576


def test_a_longer_turn_of_a_conversation(
    engine: Engine, deep_hf: HfLlava, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    """The prompt, the answer's own tokens and a new question: the answer comes from the cache too."""
    asked = about(fresh, ELSEWHERE)
    tokenizer = deep_hf.processor.tokenizer
    steps = 28  # up to token 617: the answer crosses the boundary at 608
    (first,) = engine.ask(asked, steps=steps)
    assert difference(first, deep_reference_for(asked, engine.config, steps=steps)) <= TOLERANCE

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    turn = encode(asked.prompt()["prompt"]) + first.token_ids + encode("\nUSER: And where?\nASSISTANT:")
    prompt = {key: value for key, value in asked.prompt().items() if key != "prompt"}
    answer = ask_by_ids(engine, {**prompt, "prompt_token_ids": turn}, steps=4)
    reference = deep_hf.generate(
        turn, asked.images, [planned(engine, fresh, asked)], 4, engine.config.position_ids == "original"
    )
    assert answer.num_cached_tokens == expected_hit(first, answer) == 608
    assert answer.token_ids == reference.token_ids
    assert difference(answer, reference) <= TOLERANCE


def planned(engine: Engine, image: Image.Image, asked: Question) -> TokenPlan | None:
    """The plan the engine has made."""
    plan: TokenPlan | None = decided(engine.processor, image, asked.crop).plan
    return plan


def ask_by_ids(engine: Engine, prompt: dict[str, Any], steps: int) -> Answer:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=steps, logprobs=-1, ignore_eos=True)
    (output,) = engine.llm.generate([prompt], sampling, use_tqdm=False)
    return _answer(output)


@pytest.mark.parametrize("stage", [0, 1])
def test_blocks_that_have_been_evicted(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image, stage: int
) -> None:
    """The pool takes back single blocks: what comes before them is given away, and nothing else."""
    asked = about(fresh, ELSEWHERE)
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    group = next(m.kv_cache_group_id for m in managers if getattr(m, "stage", 0) == stage)
    for place in (0, 0.5, 1):
        assert engine.llm.reset_prefix_cache()
        request_id = engine.add("sent", asked)
        eviction = engine.scheduler.evictions[request_id]
        blocks = blocks_when_prefilled(engine, request_id)[group]
        engine.finish()
        index = int(place * ((eviction.num_kept(stage, 576) - 1) // BLOCK))
        engine.block_pool.evict_blocks({blocks[index].block_id})
        (answer,) = right(engine, deep_reference_for, asked)
        first_gone = eviction.token_index(stage, index * BLOCK)
        assert answer.num_cached_tokens == whole_blocks(first_gone)


def blocks_when_prefilled(engine: Engine, request_id: str) -> list[list[Any]]:
    """The blocks of a request in each KV cache group, its prompt just computed."""
    request = engine.scheduler.requests[request_id]
    while request.num_computed_tokens < request.num_prompt_tokens:
        engine.step()
    return [list(group) for group in engine.scheduler.kv_cache_manager.coordinator.get_blocks(request_id)]


def test_reset_leaves_the_pool_full(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    asked = about(fresh, ELSEWHERE)
    num_free = engine.block_pool.get_num_free_blocks()
    right(engine, deep_reference_for, asked, about(fresh, LOW))
    right(engine, deep_reference_for, asked)
    assert engine.block_pool.get_num_free_blocks() == num_free == engine.block_pool.num_gpu_blocks - 1
    assert engine.llm.reset_prefix_cache()
    assert not engine.block_pool.cached_block_hash_to_block._cache
    assert not engine.block_pool.cached_block_hashes_by_block
    assert engine.block_pool.get_num_free_blocks() == num_free
    (answer,) = right(engine, deep_reference_for, asked)
    assert answer.num_cached_tokens == 0


def test_the_vision_tower_runs_once_for_all_regions(
    evicting_engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image
) -> None:
    encoder = evicting_engine.model.crop_encoder
    before, hits = encoder.num_encoded, encoder.cache.num_hits
    for region in (FIRST, LOW, ELSEWHERE, None):
        right(evicting_engine, deep_reference_for, about(fresh, region))
    assert encoder.cache.num_hits == hits  # the model is not even asked: vLLM has kept the embeddings
    right(evicting_engine, deep_reference_for, about(fresh, FIRST, method="plc+ilp"))
    assert encoder.cache.num_hits == hits + 1
    assert encoder.num_encoded == before + 1


def ask_by_uuid(
    engine: Engine, uuid: str, image: Image.Image | None, region: list[list[float]] | None
) -> Answer:
    """With the image itself, or with its uuid only."""
    prompt = about(noise_image(0), region).prompt()
    prompt |= {"multi_modal_data": {"image": [image]}, "multi_modal_uuids": {"image": [uuid]}}
    return ask_by_ids(engine, prompt, steps=4)


def test_an_image_known_by_uuid_serves_any_region(
    engine: Engine, deep_reference_for: ReferenceFor, fresh: Image.Image, request: pytest.FixtureRequest
) -> None:
    """Evicted images are embedded whole, so the cached embeddings fit every region."""
    uuid = request.node.nodeid
    ask_by_uuid(engine, uuid, fresh, FIRST)
    for region in (LOW, FIRST, None, ELSEWHERE):
        answer = ask_by_uuid(engine, uuid, None, region)
        reference = deep_reference_for(about(fresh, region), engine.config, steps=4)
        assert answer.token_ids == reference.token_ids
        assert difference(answer, reference) <= TOLERANCE


def test_an_image_sent_whole_serves_any_region_by_uuid(
    engine: Engine, deep_reference_for: ReferenceFor, request: pytest.FixtureRequest
) -> None:
    """Its size is remembered: this picture is no square."""
    uuid, image = request.node.nodeid, noise_image(201, 500, 400)
    ask_by_uuid(engine, uuid, image, None)
    answer = ask_by_uuid(engine, uuid, None, ELSEWHERE)
    reference = deep_reference_for(about(image, ELSEWHERE), engine.config, steps=4)
    assert difference(answer, reference) <= TOLERANCE


def test_an_unknown_uuid_without_region_is_refused_by_vllm(engine: Engine) -> None:
    with pytest.raises(ValueError, match="data is not provided"):
        ask_by_uuid(engine, "never seen", None, None)


def test_an_unknown_uuid_with_a_region_is_refused(engine: Engine) -> None:
    """As vLLM refuses it without one."""
    with pytest.raises(ValueError, match="data is not provided"):
        ask_by_uuid(engine, "never seen", None, FIRST)


def test_regions_differ(deep_reference_for: ReferenceFor, evicting_engine: Engine) -> None:
    """The control for this file: an answer for the wrong region would be noticed."""
    references = [
        deep_reference_for(about(noise_image(202), region), evicting_engine.config)
        for region in (FIRST, ELSEWHERE, LOW, LOW_TOO, None)
    ]
    for index, one in enumerate(references):
        for other in references[:index]:
            assert difference(one, other) > NOTICEABLE


def test_a_step_that_evicts_never_runs_without_its_embeddings(evicting_engine: Engine) -> None:
    """All rows would run with attention metadata of fewer."""
    with pytest.raises(RuntimeError, match="without its embeddings"):
        evicting_engine.model.forward(None, torch.zeros(1, dtype=torch.long), evicting=object())
