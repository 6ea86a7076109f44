# SPDX-License-Identifier: Apache-2.0
"""Whatever the scheduler does with evicting requests, each is answered as if it were alone."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cpu.conftest import EVICT, Answer, Engine, Question, ReferenceFor, _answer, reference_by
from tests.cpu.test_eviction_kv import serve_plan
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.cpu.test_soak import keep_request_id
from tests.pictures import noise_image
from tests.reference import HfLlava, Prompt, Reference
from vllm_crop.planning.plan import NEVER, TokenPlan

pytestmark = pytest.mark.vllm_runtime

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
ELSEWHERE, LOW = cells(2, 3, 3, 4), cells(6, 6, 7, 7)
NUM_IMAGE = 576
SHORT = "USER: {images}What?\n"
TEXT_ONLY = Question(text="USER: What is the time?\nASSISTANT:")


@pytest.fixture(params=["evicting_engine", "staged_engine"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Chunks of 256 tokens and one stage, or whole prompts and two. All blocks are free before and after."""
    found: Engine = request.getfixturevalue(request.param)
    assert found.llm.reset_prefix_cache()
    yield found
    assert_nothing_left(found)


@pytest.fixture(autouse=True)
def keep_request_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's ids are ours, without random characters."""
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr(InputProcessor, "assign_request_id", staticmethod(keep_request_id))


def assert_nothing_left(engine: Engine) -> None:
    assert engine.block_pool.get_num_free_blocks() == engine.block_pool.num_gpu_blocks - 1
    assert not engine.scheduler.requests
    for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers:
        assert not manager.req_to_blocks
        assert not manager.num_cached_block
        assert not getattr(manager, "_num_published", None)
        assert not getattr(manager, "_new_tails", None)


def pruned(seed: int, region: list[list[float]] = ELSEWHERE, method: str = "ilp") -> Question:
    return Question((noise_image(seed),), {"regions": [region], "method": method}, SHORT)


def unpruned(seed: int) -> Question:
    return Question((noise_image(seed),), {"method": "off"}, SHORT)


def check(answer: Answer, reference: Reference) -> None:
    steps = len(answer.token_ids)
    assert answer.num_prompt_tokens == reference.num_prompt_tokens
    assert answer.token_ids == reference.token_ids[:steps]
    shorter = replace(reference, logprobs=reference.logprobs[:steps])
    assert difference(answer, shorter) <= TOLERANCE


# Chunks


def step_through(engine: Engine, request_id: str, stops: Sequence[int]) -> None:
    """Prefill a request in chunks that end at these tokens, and others in chunks that are no larger."""
    scheduler = engine.scheduler
    request, budget = scheduler.requests[request_id], scheduler.max_num_scheduled_tokens
    for stop in stops:
        chunk = stop - request.num_computed_tokens
        alone = len(scheduler.requests) == 1  # vLLM then lets it use the whole budget
        scheduler.max_num_scheduled_tokens = chunk if alone else budget
        scheduler.scheduler_config.long_prefill_token_threshold = chunk
        engine.step()
        assert request.num_computed_tokens == stop
    scheduler.max_num_scheduled_tokens = budget
    scheduler.scheduler_config.long_prefill_token_threshold = 0


def first_run(engine: Engine, request_id: str, stage: int) -> tuple[int, int]:
    """Begin and end of the first eight or more tokens in a row that the stage runs without."""
    evicted = set(engine.scheduler.evictions[request_id].evicted[stage].tolist())
    begin = next(token for token in sorted(evicted) if evicted.issuperset(range(token, token + 8)))
    end = next(token for token in range(begin, begin + NUM_IMAGE) if token not in evicted)
    return begin, end


@pytest.mark.parametrize("company", ["alone", "after others", "before others"])
def test_chunks_of_evicted_tokens_only(
    engine: Engine, deep_reference_for: ReferenceFor, company: str
) -> None:
    """A single one, some, and between them one that stays: no row, or others' rows only, are left."""
    asked, others = pruned(300), {"text": TEXT_ONLY, "pruned": pruned(301, LOW)}
    if company == "after others":
        for name, question in others.items():
            engine.add(name, question, steps=14)
        answer_some(engine, "pruned", 1)  # they decode
    engine.add("asked", asked)
    begin, end = first_run(engine, "asked", stage=1)
    step_through(engine, "asked", [begin])
    if company == "before others":
        for name, question in others.items():
            engine.add(name, question, steps=14)
    step_through(engine, "asked", [begin + 1, begin + 2, end - 1, end, end + 1, min(end + 2, begin + 200)])
    answers = engine.finish()
    check(answers.pop("asked"), deep_reference_for(asked, engine.config))
    for name, answer in answers.items():
        check(answer, deep_reference_for(others[name], engine.config, steps=14))


def test_chunks_of_one_token_each(engine: Engine, deep_reference_for: ReferenceFor) -> None:
    """Past tokens that stay and tokens that leave; V2 takes such chunks for decoding."""
    asked = pruned(302)
    engine.add("asked", asked)
    begin, _ = first_run(engine, "asked", stage=1)
    step_through(engine, "asked", range(begin - 3, begin + 9))
    check(engine.finish()["asked"], deep_reference_for(asked, engine.config))


def test_a_chunk_of_a_pruned_request_that_evicts_nothing(
    engine: Engine, deep_reference_for: ReferenceFor
) -> None:
    """Before the first evicted token, and after the last one, where late lengths still are other lengths."""
    asked = pruned(303)
    engine.add("asked", asked)
    evicted = engine.scheduler.evictions["asked"].evicted[-1]
    first, last = int(evicted[0]), int(evicted[-1])
    stops = [*sorted({first - 1, first}), *range(first + 250, last, 250), last + 1, last + 3]
    step_through(engine, "asked", stops)
    check(engine.finish()["asked"], deep_reference_for(asked, engine.config))


@pytest.fixture(scope="module")
def narrow_engine(deep_checkpoint: Path) -> Engine:
    """64 tokens a step; penalties show in its logprobs."""
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 400}
    return Engine(deep_checkpoint, EVICT, max_model_len=2048, logprobs_mode="processed_logprobs", **options)


def test_edges_with_64_tokens_a_step(narrow_engine: Engine, deep_reference_for: ReferenceFor) -> None:
    middle = pruned(304)
    questions = [
        replace(middle, text="{images}What?\n"),
        replace(middle, text="What?\n{images}", after_image=""),
        replace(middle, text="{images}", after_image=""),
        unpruned(304),
        TEXT_ONLY,
    ]
    for num_cached in (0, 544):
        answers = narrow_engine.ask(*questions, steps=3)
        for question, answer in zip(questions, answers, strict=True):
            check(answer, deep_reference_for(question, narrow_engine.config, steps=3))
            assert answer.num_cached_tokens >= num_cached or not question.images
    assert_nothing_left(narrow_engine)


# Plans that no budget makes


def planned_reference(hf: HfLlava, engine: Engine, asked: Question, plan: TokenPlan, steps: int) -> Reference:
    ids = hf.processor.tokenizer.encode(asked.prompt()["prompt"], add_special_tokens=False)
    original = engine.config.position_ids == "original"
    return hf.generate(ids, asked.images, [plan] * len(asked.images), steps, original)


@pytest.mark.parametrize("text", [SHORT, "{images}", "{images}What?\n"])
def test_everything_evicted(
    engine: Engine, deep_hf: HfLlava, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Of the image nothing is left; where it ends the prompt, its last token stays."""
    stages = engine.config.stages
    asked = replace(pruned(305), text=text, after_image="" if text == "{images}" else "\n")
    with monkeypatch.context() as patch:
        plan = serve_plan(engine, patch, [stages[index % len(stages)] for index in range(NUM_IMAGE)])
        answers = [engine.ask(asked, steps=4)[0] for _ in range(2)]
    reference = planned_reference(deep_hf, engine, asked, plan, steps=4)
    assert reference.prompt_rows_per_layer[-1] == max(1, len(asked.prompt()["prompt"]) - len("<image>"))
    for answer in answers:
        check(answer, reference)
    assert answers[1].num_cached_tokens == (answers[1].num_prompt_tokens - 1) // 32 * 32
    whole = planned_reference(deep_hf, engine, asked, unmarked(plan), steps=4)
    assert difference(whole, reference) > NOTICEABLE


def unmarked(plan: TokenPlan) -> TokenPlan:
    return replace(plan, evicted_from_layer=np.full_like(plan.evicted_from_layer, NEVER))


def test_markers_in_text_mean_nothing(engine: Engine, deep_hf: HfLlava) -> None:
    """Outside of images a marker is a token like any other, and nobody's tokens leave."""
    markers = list(engine.scheduler.eviction_settings.marker_ids)
    ids = [*markers, *deep_hf.processor.tokenizer.encode("What?\n"), *markers, 40]
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=-1, ignore_eos=True)
    (output,) = engine.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    check(_answer(output), deep_hf.generate(ids, [], [], 4))


# Coming and going


def test_requests_come_at_different_steps(engine: Engine, deep_reference_for: ReferenceFor) -> None:
    arriving = {
        0: pruned(310),
        1: TEXT_ONLY,
        2: unpruned(311),
        4: pruned(312, LOW),
        5: pruned(310, method="plc+ilp"),
        9: pruned(311, LOW),
    }
    answers: dict[str, Answer] = {}
    for step in range(10):
        if step in arriving:
            engine.add(str(step), arriving[step])
        answers |= engine.step()
    answers |= engine.finish()
    for step, question in arriving.items():
        check(answers[str(step)], deep_reference_for(question, engine.config))


@contextmanager
def pool_of(engine: Engine, num_blocks: int) -> Iterator[None]:
    """Leave so many blocks in the pool."""
    pool = engine.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - num_blocks)
    try:
        yield
    finally:
        pool.free_blocks(taken)


def blocks_of_one(engine: Engine, question: Question) -> int:
    """What the prompt takes in all KV cache groups."""
    engine.add("measured", question, steps=2)
    request = engine.scheduler.requests["measured"]
    while request.num_computed_tokens < request.num_prompt_tokens:
        engine.step()
    blocks = engine.scheduler.kv_cache_manager.coordinator.get_blocks("measured")
    engine.finish()
    return sum(map(len, blocks))


def test_preemption_and_resumption(
    engine: Engine, deep_reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool for two prompts, but not for their answers of 48 tokens."""
    questions = {"1": pruned(320), "2": pruned(321, LOW), "3": pruned(322), "text": TEXT_ONLY}
    num_blocks = 2 * blocks_of_one(engine, questions["1"]) + 6
    preempted: list[tuple[str, int]] = []
    preempt = engine.scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append((request.request_id, request.num_output_tokens))
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", watched)
    with pool_of(engine, num_blocks):
        for name, question in questions.items():
            engine.add(name, question, steps=48)
        answers = engine.finish()
    print(f"{num_blocks} blocks, preempted after so many tokens: {preempted}")
    assert preempted
    assert any(name != "text" and num_tokens for name, num_tokens in preempted)
    for name, question in questions.items():
        check(answers[name], deep_reference_for(question, engine.config, steps=48))


def prefill_into_evicted(engine: Engine) -> None:
    begin, end = first_run(engine, "aborted", stage=1)
    step_through(engine, "aborted", [begin + 2, end - 2])


def answer_some(engine: Engine, request_id: str, num_tokens: int) -> None:
    """Run until a request has so many tokens of its answer."""
    request = engine.scheduler.requests[request_id]
    while request.num_output_tokens < num_tokens:
        engine.step()


ABORTED = {
    "waiting": lambda engine: None,
    "inside its evicted tokens": prefill_into_evicted,
    "after its first token": lambda engine: answer_some(engine, "aborted", 1),
    "while decoding": lambda engine: answer_some(engine, "aborted", 3),
    "before its last token": lambda engine: answer_some(engine, "aborted", 5),
}


@pytest.mark.parametrize("when", ABORTED)
def test_abort(engine: Engine, deep_reference_for: ReferenceFor, when: str) -> None:
    """Another one goes on undisturbed, the same can be asked again, and no block is lost."""
    asked, other = pruned(330), pruned(331, LOW)
    engine.add("other", other, steps=12)
    answer_some(engine, "other", 1)
    engine.add("aborted", asked, steps=6)
    ABORTED[when](engine)
    engine.llm.llm_engine.abort_request(["aborted"])
    engine.add("again", asked, steps=4)
    answers = engine.finish()
    assert answers.keys() == {"other", "again"}
    check(answers["other"], deep_reference_for(other, engine.config, steps=12))
    check(answers["again"], deep_reference_for(asked, engine.config, steps=12))


@pytest.mark.parametrize("aborted", [False, True], ids=["finished", "aborted"])
def test_an_id_used_again_at_once(engine: Engine, deep_reference_for: ReferenceFor, aborted: bool) -> None:
    """The worker hears of the end of the one and of the beginning of the other in the same step."""
    if aborted and engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling:
        pytest.skip("vLLM itself gives the new request what is still under way for an old one of its id")
    questions = [pruned(340), pruned(340, LOW), unpruned(341), pruned(341), TEXT_ONLY, pruned(340)]
    for question in questions:
        if aborted:
            engine.add("same", pruned(342), steps=9)
            answer_some(engine, "same", 2)
            engine.llm.llm_engine.abort_request(["same"])
        engine.add("same", question, steps=3)
        answers: dict[str, Answer] = {}
        while not answers:
            answers = engine.step()
        check(answers["same"], deep_reference_for(question, engine.config, steps=3))
    engine.finish()


@pytest.mark.parametrize("question", [unpruned(343), TEXT_ONLY], ids=["unpruned", "text"])
def test_an_id_used_again_while_the_old_request_is_still_in_memory(
    engine: Engine, question: Question
) -> None:
    """Somebody may hold it, or the garbage collector be late: its eviction is not that of the new one."""
    engine.add("same", pruned(343), steps=2)
    held = engine.scheduler.requests["same"]
    engine.finish()
    engine.add("same", question)
    stale = engine.scheduler.evictions.get("same")
    engine.llm.llm_engine.abort_request(["same"])
    engine.finish()
    assert held.block_hashes.eviction is not None
    assert stale is None


# Sampling


class Following(HfLlava):
    """The reference along an answer that was not chosen greedily.

    Attributes:
        logits: `[steps, vocab]` of the last answer.
    """

    def __init__(self, hf: HfLlava, token_ids: Sequence[int]) -> None:
        vars(self).update(vars(hf))
        self.given = list(token_ids)
        self.logits = torch.empty(0)

    def _answer(self, prompt: Prompt, last_hidden: Any, steps: int) -> Reference:
        logits = [self.model.lm_head(last_hidden(self.given[:step])) for step in range(steps)]
        self.logits = torch.stack(logits).double()
        logprobs = torch.log_softmax(self.logits, dim=-1)
        return Reference(self.given, logprobs, len(prompt.rows), [])

    def follow(self, engine: Engine, asked: Question) -> Reference:
        """Plans as the engine does."""
        return reference_by(self)(asked, engine.config, steps=len(self.given))


def test_several_answers_to_one_prompt(staged_engine: Engine, deep_hf: HfLlava) -> None:
    """n=3 shares the prompt's blocks; each answer is that of a request of its own with the same seed.

    Whole prompts only: vLLM's V1 runner on a CPU fails on a seeded request whose prompt comes in chunks.
    """
    from vllm import SamplingParams

    engine, asked = staged_engine, pruned(350)

    def sample(n: int, seed: int) -> Any:
        sampling = SamplingParams(n=n, temperature=1.0, seed=seed, max_tokens=6, logprobs=-1, ignore_eos=True)
        (output,) = engine.llm.generate([asked.prompt()], sampling, use_tqdm=False)
        return output

    together = sample(3, seed=7)
    answers = [_answer(one_of(together, index)) for index in range(3)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    for index, answer in enumerate(answers):
        assert _answer(sample(1, seed=7 + index)).token_ids == answer.token_ids
        assert difference(answer, Following(deep_hf, answer.token_ids).follow(engine, asked)) <= TOLERANCE
    assert_nothing_left(engine)


def one_of(output: Any, index: int) -> Any:
    """A RequestOutput with one of its answers only."""
    single = copy(output)
    single.outputs = [output.outputs[index]]
    return single


@pytest.mark.skipif(ON_V2, reason="Triton's interpreter cannot run vLLM's kernel for grammars")
def test_structured_output(engine: Engine, deep_hf: HfLlava) -> None:
    """Each token is the best of those that the grammar allows."""
    from vllm.sampling_params import StructuredOutputsParams

    asked, letters = pruned(351), "abcdefgh"
    grammar = StructuredOutputsParams(regex=f"[{letters}]{{5}}")
    engine.add("asked", asked, steps=5, structured_outputs=grammar)
    engine.add("free", pruned(352), steps=5)
    answer = engine.finish()["asked"]
    allowed = torch.tensor([deep_hf.processor.tokenizer.convert_tokens_to_ids(letter) for letter in letters])
    assert set(answer.token_ids) <= set(allowed.tolist())
    reference = Following(deep_hf, answer.token_ids).follow(engine, asked)
    expected = torch.log_softmax(reference.logprobs[:, allowed], dim=-1)
    assert allowed[expected.argmax(dim=-1)].tolist() == answer.token_ids
    assert float((answer.logprobs[:, allowed] - expected).abs().max()) <= TOLERANCE


def test_penalties_count_no_marker_against_a_word(narrow_engine: Engine, deep_hf: HfLlava) -> None:
    """The penalised logprobs are those of a prompt with image tokens where the labels are."""
    asked, tokenizer = pruned(353), deep_hf.processor.tokenizer
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.6, "frequency_penalty": 0.3}
    narrow_engine.add("asked", asked, **penalties)
    answer = narrow_engine.finish()["asked"]
    markers = set(narrow_engine.scheduler.eviction_settings.marker_ids)
    assert markers <= set(answer.prompt_token_ids)
    assert min(markers) >= len(tokenizer)
    reference = Following(deep_hf, answer.token_ids)
    reference.follow(narrow_engine, asked)
    prompt_ids = tokenizer.encode(asked.prompt()["prompt"], add_special_tokens=False)
    expected = torch.log_softmax(penalised(reference.logits, prompt_ids, answer.token_ids), dim=-1)
    assert expected.argmax(dim=-1).tolist() == answer.token_ids
    assert float((answer.logprobs - expected).abs().max()) <= TOLERANCE
    unpenalised = torch.log_softmax(reference.logits, dim=-1)
    assert float((answer.logprobs - unpenalised).abs().max()) > NOTICEABLE


def penalised(logits: torch.Tensor, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> torch.Tensor:
    """`logits` `[steps, vocab]` after a repetition penalty of 1.5, presence 0.6 and frequency 0.3."""
    rows = []
    for step, row in enumerate(logits):
        answered = torch.bincount(torch.tensor(answer_ids[:step], dtype=torch.long), minlength=len(row))
        seen = answered > 0
        seen[torch.tensor(prompt_ids)] = True
        repeated = torch.where(row > 0, row / 1.5, row * 1.5)
        rows.append(torch.where(seen, repeated, row) - 0.3 * answered - 0.6 * (answered > 0))
    return torch.stack(rows)


# Asynchronous scheduling


@pytest.mark.skipif(not ON_V2, reason="V1 on a CPU schedules synchronously")
def test_asynchronous_scheduling(
    deep_checkpoint: Path, deep_reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's default on GPUs; its CPU platform switches it off."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def update_and_switch_on(vllm_config: Any) -> None:
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(update_and_switch_on))
    engine = Engine(deep_checkpoint, EVICT, max_num_batched_tokens=256, num_gpu_blocks_override=400)
    assert type(engine.scheduler).__name__ == "EvictionAsyncScheduler"
    questions = [pruned(360), pruned(361, LOW), unpruned(362), TEXT_ONLY, pruned(360, LOW)]
    for hit in (0, 576):
        answers = engine.ask(*questions, steps=6)
        for question, answer in zip(questions, answers, strict=True):
            check(answer, deep_reference_for(question, engine.config, steps=6))
        assert answers[0].num_cached_tokens == hit
    engine.add("aborted", questions[0], steps=20)
    for _ in range(3):
        engine.step()
    engine.llm.llm_engine.abort_request(["aborted"])
    engine.add("again", questions[1], steps=4)
    check(engine.finish()["again"], deep_reference_for(questions[1], engine.config, steps=4))
    assert_nothing_left(engine)
