# SPDX-License-Identifier: Apache-2.0
"""KV memory really taken: blocks out of the pool, bytes behind them, and how many requests fit at once."""

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.conftest import Engine, Question, ReferenceFor
from tests.cpu.test_parity import TOLERANCE, cells, difference
from tests.pictures import noise_image
from tests.slow_plan import embeddings_of, plan_of
from vllm_crop.benchmarking.dummy_llava import DummySize, make_checkpoint
from vllm_crop.eviction.grouping import KVGrouping, layers_per_stage, predict_grouping
from vllm_crop.eviction.markers import EvictionSettings
from vllm_crop.planner import Planner
from vllm_crop.planning.plan import TokenPlan, whole_image_plan

pytestmark = pytest.mark.vllm_runtime

BLOCK = 32
TEXT, NUM_TEXT, NUM_IMAGE = "USER: {images}What?\n", 13, 576
NUM_PROMPT = NUM_TEXT + NUM_IMAGE
POOL = {"num_gpu_blocks_override": 400, "max_model_len": 640, "max_num_batched_tokens": 2048}


@dataclass(frozen=True)
class Setup:
    """A server, the image tokens that stay from each of its eviction layers on, and what vLLM makes of it.

    Attributes:
        groups: stage and number of layers of each KV cache group.
        blocks: what one pruned request takes in each of them.
    """

    layers: int
    eviction_layers: tuple[int, ...]
    kept: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]

    @property
    def rate(self) -> float:
        """The pruning rate that keeps so many."""
        stages = layers_per_stage(self.layers, self.eviction_layers)
        pairs = sum(
            count * kept
            for count, kept in zip(stages, (NUM_IMAGE, *self.kept[: len(stages) - 1]), strict=True)
        )
        return 1 - pairs / (NUM_IMAGE * self.layers)

    @property
    def leaves_at(self) -> list[int | None]:
        """The layer each image token leaves at, those at the end first."""
        befores = (NUM_IMAGE, *self.kept)
        leaving: list[int | None] = [None] * NUM_IMAGE
        for layer, before, kept in zip(self.eviction_layers, befores, self.kept, strict=False):
            leaving[kept:before] = [layer] * (before - kept)
        return leaving

    @property
    def tokens_per_stage(self) -> list[int]:
        return [NUM_PROMPT, *(NUM_TEXT + kept for kept in self.kept)]

    @property
    def grouping(self) -> KVGrouping:
        return predict_grouping(self.layers, self.eviction_layers, BLOCK)


# The groups and blocks of section 8 of the design notes, and others worked out by hand.
SETUPS = {
    "8 layers, K=1": Setup(8, (1,), (64,), ((0, 1), *[(1, 1)] * 7), (19, *[3] * 7)),
    "8 layers, K=2": Setup(8, (2,), (64,), ((0, 2), (1, 2), (1, 2), (1, 2)), (19, 3, 3, 3)),
    "8 layers, K=3": Setup(8, (3,), (64,), ((0, 3), (1, 3), (1, 2)), (19, 3, 3)),
    "8 layers, K=3, 37 kept": Setup(8, (3,), (24,), ((0, 3), (1, 3), (1, 2)), (19, 2, 2)),
    "8 layers, K=4": Setup(8, (4,), (64,), ((0, 4), (1, 4)), (19, 3)),
    "8 layers, K=5": Setup(8, (5,), (64,), ((0, 3), (0, 2), (1, 3)), (19, 19, 3)),
    "8 layers, K=6": Setup(8, (6,), (64,), ((0, 2), (0, 2), (0, 2), (1, 2)), (19, 19, 19, 3)),
    "8 layers, K=7": Setup(8, (7,), (64,), (*[(0, 1)] * 7, (1, 1)), (*[19] * 7, 3)),
    "8 layers, stages 2, 5": Setup(
        8, (2, 5), (256, 36), ((0, 2), (1, 2), (1, 1), (2, 2), (2, 1)), (19, 9, 9, 2, 2)
    ),
    "8 layers, stages 1, 4": Setup(
        8, (1, 4), (192, 64), ((0, 1), *[(1, 1)] * 3, *[(2, 1)] * 4), (19, *[7] * 3, *[3] * 4)
    ),
    "12 layers, K=2": Setup(12, (2,), (64,), ((0, 2), *[(1, 2)] * 5), (19, *[3] * 5)),
    "12 layers, K=3": Setup(12, (3,), (64,), ((0, 3), *[(1, 3)] * 3), (19, *[3] * 3)),
    "12 layers, K=4": Setup(12, (4,), (64,), ((0, 4), (1, 4), (1, 4)), (19, 3, 3)),
    "12 layers, K=6": Setup(12, (6,), (64,), ((0, 6), (1, 6)), (19, 3)),
}
# Of section 8 of the design notes: layer-blocks and saving of a pruned request.
KNOWN = {
    "8 layers, K=2": (56, 0.632),
    "8 layers, K=4": (88, 0.421),
    "8 layers, K=3": (75, 0.507),
    "8 layers, K=3, 37 kept": (69, 0.546),
    "8 layers, stages 2, 5": (82, 0.461),
}


class Engines:
    """Starts each engine once. They stay: one that goes takes vLLM's process groups with it."""

    def __init__(self, checkpoints: dict[int, Path]) -> None:
        self.checkpoints = checkpoints
        self._started: dict[Any, Engine] = {}

    def get(self, layers: int, eviction_layers: Sequence[int] | None, **options: Any) -> Engine:
        """`eviction_layers`: None for plain vLLM."""
        key = (layers, tuple(eviction_layers or ()), *options.items())
        if key not in self._started:
            # At this rate every engine can start; the tests plan by themselves.
            crop = eviction_layers and {"eviction_layers": list(eviction_layers), "method": "plc"}
            self._started[key] = Engine(self.checkpoints[layers], crop, **(POOL | options))
        engine = self._started[key]
        assert engine.llm.reset_prefix_cache()
        return engine


@pytest.fixture(scope="module")
def engines(deep_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    twelve = make_checkpoint(tmp_path_factory.mktemp("llava-12"), DummySize(layers=12, branch_gain=0.7))
    return Engines({8: deep_checkpoint, 12: twelve})


def layer_tokens_per_block(engine: Engine) -> float:
    """From the bytes that the worker has allocated: keys and values of one token in one layer count one."""
    from vllm.model_executor.layers.attention import Attention

    caches = [module.kv_cache for module in engine.model.modules() if isinstance(module, Attention)]
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
    config = engine.scheduler.kv_cache_config
    spec = config.kv_cache_groups[0].kv_cache_spec
    return float(sum(storages.values()) / config.num_blocks / (spec.page_size_bytes / spec.block_size))


def blocks_after_prefill(engine: Engine, question: Question) -> list[int]:
    """What a request holds in each KV cache group when its prompt is computed. It is aborted then."""
    num_free = engine.block_pool.get_num_free_blocks()
    engine_id = engine.add("measured", question, steps=4)
    request = engine.scheduler.requests[engine_id]
    while request.num_computed_tokens < request.num_prompt_tokens:
        engine.step()
    assert request.num_prompt_tokens == NUM_PROMPT
    coordinator = engine.scheduler.kv_cache_manager.coordinator
    blocks = coordinator.get_blocks(engine_id)
    assert engine.block_pool.get_num_free_blocks() == num_free - sum(map(len, blocks))
    engine.llm.llm_engine.abort_request([engine_id], internal=True)
    engine.finish()
    assert engine.block_pool.get_num_free_blocks() == num_free
    return [len(group) for group in blocks]


def serve_plan(engine: Engine, monkeypatch: pytest.MonkeyPatch, leaves_at: Sequence[int | None]) -> TokenPlan:
    """Let the processor evict its images' tokens at these layers, whatever the budget says; the plan."""
    whole = whole_image_plan(engine.processor.geometry.grid(336, 336))
    embeddings = tuple(
        replace(embedding, evicted_from_layer=layer)
        for embedding, layer in zip(embeddings_of(whole), leaves_at, strict=True)
    )
    plan, plan_all = plan_of(whole.grid, whole.pruning_rate, embeddings), Planner.plan

    def planned(*args: Any) -> Any:
        return tuple(replace(decision, plan=plan) for decision in plan_all(*args))

    monkeypatch.setattr(Planner, "plan", planned)
    return plan


def about(seed: int, **crop: Any) -> Question:
    return Question((noise_image(seed),), {"regions": [cells(2, 3, 3, 4)], **crop}, TEXT)


@pytest.mark.parametrize("name", SETUPS)
def test_blocks_of_one_pruned_request(name: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = SETUPS[name]
    engine = engines.get(setup.layers, setup.eviction_layers)
    unpruned = blocks_after_prefill(engine, about(210, method="off"))
    if len(setup.kept) == 1:
        pruned = blocks_after_prefill(engine, about(210, method="ilp", pruning_rate=setup.rate))
    else:
        serve_plan(engine, monkeypatch, setup.leaves_at)
        pruned = blocks_after_prefill(engine, about(210, method="ilp", pruning_rate=0.3))
    plain = engines.get(setup.layers, None)
    (plain_blocks,) = blocks_after_prefill(plain, Question((noise_image(210),), text=TEXT))
    taken, unpruned_taken = (sum(blocks) * layer_tokens_per_block(engine) for blocks in (pruned, unpruned))
    plain_taken = plain_blocks * layer_tokens_per_block(plain)
    ideal = setup.grouping.ideal_layer_tokens(setup.tokens_per_stage)
    saving, ideal_saving = 1 - taken / plain_taken, 1 - ideal / (setup.layers * NUM_PROMPT)
    print(
        f"{name} | {len(pruned)} ({','.join(str(layers) for _, layers in setup.groups)}) | "
        f"{'+'.join(map(str, pruned))}={sum(pruned)} | {sum(unpruned)} | {taken / BLOCK:g} of "
        f"{plain_taken / BLOCK:g} | {saving:.1%} | {ideal_saving:.1%}"
    )
    assert tuple(pruned) == setup.blocks
    assert tuple((group.stage, group.num_layers) for group in setup.grouping.groups) == setup.groups
    assert_as_predicted(engine, setup)
    assert taken == setup.grouping.layer_tokens(setup.tokens_per_stage)
    assert unpruned == [plain_blocks] * len(setup.groups)
    assert unpruned_taken == pytest.approx(plain_taken * (1 + setup.grouping.padding_fraction))
    assert plain_taken == setup.grouping.plain_layer_tokens(NUM_PROMPT)
    # Within one block per group of what the kept tokens need.
    needed = [setup.tokens_per_stage[stage] for stage, _ in setup.groups]
    assert all(0 <= count * BLOCK - tokens < BLOCK for count, tokens in zip(pruned, needed, strict=True))
    if name in KNOWN:
        layer_blocks, known_saving = KNOWN[name]
        assert taken == layer_blocks * BLOCK
        assert saving == pytest.approx(known_saving, abs=5e-4)


def assert_as_predicted(engine: Engine, setup: Setup) -> None:
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    found = [(getattr(group.kv_cache_spec, "stage", 0), len(group.layer_names)) for group in groups]
    assert tuple(found) == setup.groups
    assert layer_tokens_per_block(engine) == setup.grouping.block_layer_tokens
    stages = EvictionSettings.from_hf_config(engine.processor.info.get_hf_config()).stages
    assert stages == setup.eviction_layers


def peak_of_running(engine: Engine, questions: list[Question], reference_for: ReferenceFor) -> int:
    """Ask all at once; the most requests that hold KV at the same time. All answers are checked."""
    num_free = engine.block_pool.get_num_free_blocks()
    for index, question in enumerate(questions):
        engine.add(str(index), question, steps=4)
    answers, peak = {}, 0
    while engine.scheduler.has_requests():
        answers |= engine.step()
        peak = max(peak, len(engine.scheduler.running))
    assert engine.block_pool.get_num_free_blocks() == num_free
    for index, question in enumerate(questions):
        assert difference(answers[str(index)], reference_for(question, engine.config, steps=4)) <= TOLERANCE
    return peak


def test_more_requests_at_once_in_the_same_memory(engines: Engines, deep_reference_for: ReferenceFor) -> None:
    """Memory for three unpruned requests of 19 blocks in 8 layers. With K=2 a pruned one takes 28 of 2."""
    num_blocks = 3 * 19 + 1  # one is vLLM's own
    # Two pictures are enough for many requests, as long as they share nothing.
    options = {"enable_prefix_caching": False}
    plain = engines.get(8, None, num_gpu_blocks_override=num_blocks, **options)
    evicting = engines.get(8, (2,), num_gpu_blocks_override=4 * num_blocks, **options)
    for engine in (plain, evicting):
        assert layer_tokens_per_block(engine) * engine.block_pool.num_gpu_blocks == 8 * BLOCK * num_blocks
    unpruned = [about(220 + index % 2, method="off") for index in range(9)]
    pruned = [
        replace(question, crop=about(0, method="ilp", pruning_rate=2 / 3).crop) for question in unpruned
    ]
    peaks = {
        "plain vLLM": peak_of_running(plain, [replace(q, crop=None) for q in unpruned], deep_reference_for),
        "eviction, unpruned": peak_of_running(evicting, unpruned, deep_reference_for),
        "eviction, pruned": peak_of_running(evicting, pruned, deep_reference_for),
    }
    print(peaks)
    assert peaks == {"plain vLLM": 3, "eviction, unpruned": 3, "eviction, pruned": 231 // 28}


def test_the_built_in_specs_are_registered_beside_ours() -> None:
    """In a new process: ours alone would keep the built-in ones out for good."""
    source = """
        import vllm_crop.eviction.kv_cache as ours
        from vllm.v1 import kv_cache_interface
        from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST as registered
        assert ours.StageAttentionSpec in registered
        assert kv_cache_interface.FullAttentionSpec in registered
        assert kv_cache_interface.MambaSpec in registered
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(source)], check=True, timeout=300)
