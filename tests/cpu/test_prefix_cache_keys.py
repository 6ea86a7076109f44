# SPDX-License-Identifier: Apache-2.0
"""Whatever the prefix cache gives away is what the prompt would have computed, and all there is of it.

vLLM's own KVCacheManager runs random requests; beside it, a model of what every physical block holds.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_crop.eviction.kv_cache import StageAttentionSpec, StageKVCacheManager
from vllm_crop.eviction.markers import write_markers
from vllm_crop.eviction.prefix_cache import PlannedBlockHashes, StageHashes
from vllm_crop.eviction.prompt_eviction import PromptEviction, read_markers

pytestmark = pytest.mark.vllm_runtime

init_none_hash(sha256)

NUM_STAGES = 2
IMAGE_ID, MARKER_IDS = 9, (7, 8)
WORDS = (1, MARKER_IDS[0])  # few, so that prompts collide, and a marker among them
IMAGE_LENGTHS = {"small": 3, "middle": 8, "large": 21}
LAYERS = (0, 1, 1, 2)  # per KV cache group its stage
MANY = 3000  # blocks: nothing is ever dropped from the cache


class Layout(NamedTuple):
    """Tokens per block of the early group, KV entries per block of late ones, tokens per hash."""

    early: int
    late: int
    hashed: int

    @property
    def step(self) -> int:
        """What vLLM aligns hits to."""
        return max(self.early, self.late)


LAYOUTS = [Layout(4, 4, 4), Layout(4, 4, 2), Layout(8, 4, 4), Layout(12, 4, 4), Layout(4, 8, 4)]


@dataclass(frozen=True)
class Piece:
    """Words, or an image (by name) with per embedding the stage it leaves at."""

    words: tuple[int, ...] = ()
    image: str = ""
    leaves_at: tuple[int, ...] = ()


Prompt = tuple[Piece, ...]


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    if draw(st.booleans()):
        return Piece(words=tuple(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9))))
    image = draw(st.sampled_from(list(IMAGE_LENGTHS)))
    length = IMAGE_LENGTHS[image]
    # Runs, as regions make them, or single tokens.
    runs = draw(st.lists(st.tuples(st.integers(0, NUM_STAGES), st.sampled_from([1, 1, 3, 9])), max_size=9))
    leaves_at = [stage for stage, count in runs for _ in range(count)][:length]
    return Piece(image=image, leaves_at=(*leaves_at, *[0] * (length - len(leaves_at))))


@st.composite
def prompt_sets(draw: st.DrawFn) -> list[Prompt]:
    """Prompts of which later ones begin as earlier ones do, some with another plan of a shared image."""
    prompts = [tuple(draw(st.lists(pieces(), min_size=1, max_size=4)))]
    for _ in range(draw(st.integers(1, 3))):
        begun = list(draw(st.sampled_from(prompts)))
        begun = begun[: draw(st.integers(0, len(begun)))]
        if begun and begun[-1].image and draw(st.booleans()):
            tokens = list(begun[-1].leaves_at)
            tokens[draw(st.integers(0, len(tokens) - 1))] = draw(st.integers(0, NUM_STAGES))
            begun[-1] = Piece(image=begun[-1].image, leaves_at=tuple(tokens))
        prompts.append((*begun, *draw(st.lists(pieces(), min_size=0 if begun else 1, max_size=2))))
    return prompts


class Running:
    """A request, and what brute force knows about it."""

    def __init__(self, request_id: str, prompt: Prompt, hash_size: int) -> None:
        token_ids: list[int] = []
        self.leaves_at: list[int] = []
        self.markers: list[tuple[str, int] | None] = []  # which part of which image a token is
        features = []
        for piece in prompt:
            if piece.image:
                length = len(piece.leaves_at)
                position = PlaceholderRange(offset=len(token_ids), length=length)
                features.append(MultiModalFeatureSpec(None, "image", piece.image, position))
                token_ids += [IMAGE_ID] * length
                self.leaves_at += piece.leaves_at
                self.markers += [(piece.image, index) for index in range(length)]
            else:
                token_ids += piece.words
                self.leaves_at += [0] * len(piece.words)
                self.markers += [None] * len(piece.words)
        self.leaves_at[-1] = 0
        placeholders = [(f.mm_position.offset, f.mm_position.length) for f in features]
        for offset, length in placeholders:
            tokens = range(offset, offset + length)
            write_markers(token_ids, tokens, [self.leaves_at[token] for token in tokens], MARKER_IDS)
        self.request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=SamplingParams(max_tokens=64),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(hash_size, sha256),
        )
        self.eviction = read_markers(token_ids, placeholders, MARKER_IDS)
        if self.eviction is not None:
            self.request.block_hashes = PlannedBlockHashes(self.request.block_hashes, self.eviction)

    @property
    def computed(self) -> int:
        return int(self.request.num_computed_tokens)

    def kept(self, stage: int, num_tokens: int) -> list[int]:
        """The tokens among the first `num_tokens` that a stage holds KV of."""
        leaves_at = [*self.leaves_at, *[0] * (num_tokens - len(self.leaves_at))]
        return [token for token in range(num_tokens) if not 0 < leaves_at[token] <= stage]

    def seen(self) -> list[tuple[int, Any]]:
        """Per token all that the model sees of it."""
        return list(itertools.zip_longest(self.request.all_token_ids, self.markers))

    def num_common(self, other: "Running") -> int:
        """Tokens both begin with."""
        pairs = zip(self.seen(), other.seen(), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Server:
    """A scheduler's part in the KV cache, and the content of every block."""

    def __init__(self, layout: Layout, num_blocks: int = MANY, fine: bool = False) -> None:
        """`fine`: tails at every hash boundary."""
        self.layout = layout
        shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        full = FullAttentionSpec(block_size=layout.early, **shape)
        late = FullAttentionSpec(block_size=layout.late, **shape)
        specs = [StageAttentionSpec.from_full(late, stage, "") if stage else full for stage in LAYERS]
        groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks, [], groups), 4096, layout.step, layout.hashed, enable_caching=True
        )
        self.managers = self.manager.coordinator.single_type_managers
        self.evictions: WeakValueDictionary[str, PromptEviction] = WeakValueDictionary()
        for manager in self.managers[1:]:
            assert isinstance(manager, StageKVCacheManager)
            manager.evictions = self.evictions
            if fine:
                manager.cache_hit_alignment_tokens = layout.hashed
        self.content: dict[int, list[Any]] = {}
        self._prefixes: dict[Any, int] = {}
        self._ids = itertools.count()

    def add(self, prompt: Prompt) -> Running:
        running = Running(str(next(self._ids)), prompt, self.layout.hashed)
        if running.eviction is not None:
            self.evictions[running.request.request_id] = running.eviction
        return running

    def entries(self, running: Running, group: int, num_tokens: int) -> list[Any]:
        """The KV entries that the group holds for the first tokens: each is all of its prefix."""
        prefix, by_token = -1, []
        for seen in running.seen()[:num_tokens]:
            prefix = self._prefixes.setdefault((prefix, seen), len(self._prefixes))
            by_token.append((group, prefix))
        return [by_token[token] for token in running.kept(LAYERS[group], num_tokens)]

    def held(self, blocks: Sequence[Any], num_entries: int) -> list[Any]:
        """The first entries in these blocks."""
        return [entry for block in blocks for entry in self.content[block.block_id]][:num_entries]

    def schedule(self, running: Running, num_tokens: int) -> int | None:
        """Tokens that a step computes of a request, None if there is no room for them."""
        request, pool = running.request, self.manager.block_pool
        hit, found = 0, None
        if not running.computed:
            found, hit, _ = self.manager.get_computed_blocks(request)
            assert hit % self.layout.step == 0
            assert hit < request.num_tokens
        num_tokens = min(num_tokens, request.num_tokens - running.computed - hit)
        before = {block.block_id for blocks in self.blocks(running) for block in blocks}
        before |= {block.block_id for blocks in (found.blocks if found else ()) for block in blocks}
        num_free = pool.get_num_free_blocks()
        start, stop = running.computed + hit, running.computed + hit + num_tokens
        num_needed = self.manager.coordinator.get_num_blocks_to_allocate(
            request.request_id,
            num_tokens=stop,
            new_computed_blocks=(found or self.manager.empty_kv_cache_blocks).blocks,
            num_encoder_tokens=0,
            total_computed_tokens=start,
            num_local_computed_tokens=start,
            num_tokens_main_model=stop,
        )
        if self.manager.allocate_slots(request, num_tokens, hit, found) is None:
            assert num_needed > num_free == pool.get_num_free_blocks()
            return None
        assert num_needed == num_free - pool.get_num_free_blocks(), "announces what it takes"
        for group, blocks in enumerate(self.blocks(running)):
            size = self.managers[group].block_size
            num_kept = len(running.kept(LAYERS[group], stop))
            assert len(blocks) == -(-num_kept // size), "blocks for kept tokens, no more"
            for block in blocks:
                if block.block_id not in before:
                    self.content[block.block_id] = [None] * size
        request.num_computed_tokens += hit
        return num_tokens

    def run(self, scheduled: Sequence[tuple[Running, int]]) -> None:
        """What the worker does in a step: copies, then KV of all rows."""
        copies, retained = self.manager.take_kv_cache_block_copies()
        self.manager.block_pool.free_blocks(retained)
        for copy in copies:
            self.content[copy.dst_block_id] = list(self.content[copy.src_block_id])
        for running, num_tokens in scheduled:
            start, stop = running.computed, running.computed + num_tokens
            for group, blocks in enumerate(self.blocks(running)):
                entries = self.entries(running, group, stop)
                size = self.managers[group].block_size
                for index in range(len(running.kept(LAYERS[group], start)), len(entries)):
                    self.content[blocks[index // size].block_id][index % size] = entries[index]
            running.request.num_computed_tokens = stop
            if stop == running.request.num_tokens:
                running.request.append_output_token_ids(WORDS[stop % len(WORDS)])

    def check(self, live: Sequence[Running]) -> None:
        """Every request finds in its blocks what it would have computed itself."""
        for running in live:
            if running.computed:
                for group, blocks in enumerate(self.blocks(running)):
                    expected = self.entries(running, group, running.computed)
                    assert self.held(blocks, len(expected)) == expected, f"group {group}"

    def blocks(self, running: Running) -> list[list[Any]]:
        """Per group the request's blocks."""
        return [m.req_to_blocks.get(running.request.request_id, []) for m in self.managers]

    def free(self, running: Running) -> None:
        self.manager.free(running.request)
        running.request.num_computed_tokens = 0

    def answer(self, prompt: Prompt, chunks: Sequence[int], num_answer_tokens: int) -> tuple[Running, int]:
        """Run a request alone and leave it running; also the tokens it found in the cache."""
        running, hit = self.add(prompt), -1
        for chunk in itertools.cycle(chunks):
            self.manager.new_step_starts()
            num_tokens = self.schedule(running, chunk)
            assert num_tokens is not None
            hit = running.computed if hit < 0 else hit
            self.run([(running, num_tokens)])
            self.check([running])
            if running.computed >= len(running.leaves_at) + num_answer_tokens:
                self.manager.new_step_starts()
                return running, hit
        raise AssertionError("no chunks")

    def shares(self, one: Running, other: Running) -> int:
        """Tokens in whole steps that one request has published and another begins with."""
        common = min(one.num_common(other), one.computed)
        return common // self.layout.step * self.layout.step


KINDS = ("start", "start", "go", "go", "go", "go", "free", "preempt")
actions = st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.sampled_from([1, 1, 2, 5, 8, 13, 40]))
steps = st.lists(st.lists(actions, min_size=1, max_size=4), min_size=2, max_size=25)
chunk_sizes = st.lists(st.sampled_from([1, 3, 4, 7, 16, 90]), min_size=1, max_size=4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=80)
@given(prompts=prompt_sets(), steps=steps, num_blocks=st.sampled_from([40, 70, MANY]), fine=st.booleans())
def test_every_request_finds_its_own_kv(
    layout: Layout,
    prompts: list[Prompt],
    steps: list[list[tuple[str, int, int]]],
    num_blocks: int,
    fine: bool,
) -> None:
    server = Server(layout, num_blocks, fine)
    live: list[Running] = []
    for step in steps:
        server.manager.new_step_starts()
        scheduled: dict[Running, int] = {}
        for kind, which, num_tokens in step:
            if kind == "start":
                live.append(server.add(prompts[which % len(prompts)]))
            elif not live:
                continue
            running = live[-1] if kind == "start" else live[which % len(live)]
            if running in scheduled:
                continue
            if kind == "free":
                live.remove(running)
            if kind in ("free", "preempt"):
                server.free(running)
                continue
            done = server.schedule(running, num_tokens)
            if done is not None:
                scheduled[running] = done
            elif others := [other for other in live if other not in scheduled]:
                server.free(others[-1])
        server.run(list(scheduled.items()))
        server.check(live)
    for running in live:
        server.free(running)
    server.manager.new_step_starts()
    assert server.manager.block_pool.get_num_free_blocks() == num_blocks - 1, "a block is never given back"
    for manager in server.managers[1:]:
        assert isinstance(manager, StageKVCacheManager)
        assert not any([manager.req_to_blocks, manager.num_cached_block, manager._partial_hit_reqs])
        assert not any([manager._num_published, manager._new_tails])


ONE_IMAGE = (Piece((1, 1, 1)), Piece(image="large", leaves_at=(1,) * 18 + (0, 2, 0)), Piece((1, 1)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=80)
@given(
    prompts=prompt_sets(),
    chunks=chunk_sizes,
    num_answer_tokens=st.integers(0, 9),
    keep_running=st.booleans(),
)
@example(prompts=[ONE_IMAGE, ONE_IMAGE], chunks=[7], num_answer_tokens=3, keep_running=False)
def test_a_request_gets_all_that_it_shares(
    layout: Layout, prompts: list[Prompt], chunks: list[int], num_answer_tokens: int, keep_running: bool
) -> None:
    server = Server(layout)
    published: list[tuple[Running, int]] = []
    for prompt in prompts:
        running, hit = server.answer(prompt, chunks, num_answer_tokens)
        most = (len(running.leaves_at) - 1) // layout.step * layout.step
        shared = max((min(server.shares(earlier, running), most) for earlier, _ in published), default=0)
        assert hit == shared
        published.append((running, running.computed))
        if not keep_running:
            server.manager.free(running.request)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=80)
@given(prompts=prompt_sets(), chunks=chunk_sizes, data=st.data())
def test_the_lookup_of_a_stage(
    layout: Layout, prompts: list[Prompt], chunks: list[int], data: st.DataObject
) -> None:
    """Any maximum, and alignment down to single hash blocks."""
    server = Server(layout, fine=True)
    published = [server.answer(prompt, chunks, 2)[0] for prompt in prompts[:-1]]
    wanted = server.add(prompts[-1])
    max_length = data.draw(st.integers(0, len(wanted.leaves_at) + 3), label="max_length")
    alignment = layout.hashed * data.draw(st.integers(1, 4), label="alignment")
    for stage, group_ids in ((1, [1, 2]), (2, [3])):
        block_hashes = wanted.request.block_hashes
        blocks_by_group, hit = StageKVCacheManager.find_longest_cache_hit(
            block_hashes,
            max_length,
            group_ids,
            server.manager.block_pool,
            server.managers[group_ids[0]].kv_cache_spec,
            drop_eagle_block=False,
            alignment_tokens=alignment,
        )

        assert hit % alignment == 0
        assert hit <= max_length
        num_tokens = min(hit, wanted.request.num_tokens)
        num_kept = len(wanted.kept(stage, num_tokens))
        assert len(blocks_by_group) == len(group_ids)
        for group, blocks in zip(group_ids, blocks_by_group, strict=True):
            assert len(blocks) == -(-num_kept // layout.late)
            assert server.held(blocks, num_kept) == server.entries(wanted, group, num_tokens)
        shared = max((min(server.shares(one, wanted), max_length) for one in published), default=0)
        shared -= shared % alignment
        assert hit >= shared
        # More than what is shared can only be tokens that the stage runs without.
        longest = max((wanted.num_common(one) for one in published), default=0)
        assert num_kept <= len(wanted.kept(stage, longest))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=80)
@given(prompts=prompt_sets())
def test_no_two_blocks_share_a_key(layout: Layout, prompts: list[Prompt]) -> None:
    """Full blocks and tails of all prompts, at every length: one content per key."""
    server = Server(layout)
    found: dict[Any, Any] = {}
    for prompt in prompts:
        running = server.add(prompt)
        num_tokens = running.request.num_tokens
        for group, stage in enumerate(LAYERS[1:], start=1):
            hashes = StageHashes(running.request.block_hashes, layout.hashed, stage, layout.late)
            entries = server.entries(running, group, num_tokens)
            for length in range(num_tokens + 1):
                num_kept = len(running.kept(stage, length))
                assert hashes.num_kept(length) == num_kept
                num_full, rest = divmod(num_kept, layout.late)
                for index in range(hashes.num_full_blocks(length)):
                    key = (group, hashes.full_block_hash(index))
                    block = entries[index * layout.late : (index + 1) * layout.late]
                    assert index < num_full
                    assert found.setdefault(key, block) == block
                if (tail := hashes.tail_hash(length)) is not None:
                    assert rest
                    block = entries[num_full * layout.late : num_kept]
                    assert found.setdefault((group, tail), block) == block
                elif rest:
                    assert length % layout.hashed


def test_a_resend_takes_the_partly_filled_block_too() -> None:
    """The case of every chat turn about the same picture."""
    server = Server(LAYOUTS[0])
    first, hit = server.answer(ONE_IMAGE, [90], 0)
    assert hit == 0
    again, hit = server.answer(ONE_IMAGE, [90], 0)

    assert hit == 24  # of 26, where stage 1 has kept 6 and stage 2 has kept 5
    for group, num_full in ((1, 1), (2, 1), (3, 1)):
        mine, theirs = server.blocks(again)[group], server.blocks(first)[group]
        assert mine[:num_full] == theirs[:num_full]
        assert mine[num_full] is not theirs[num_full], "writes into a block it shares"


def test_a_tail_is_given_away_only_after_its_step() -> None:
    server = Server(LAYOUTS[0])
    first, twin = server.add(ONE_IMAGE), server.add(ONE_IMAGE)
    server.manager.new_step_starts()
    scheduled = [(running, server.schedule(running, 90)) for running in (first, twin)]
    # Up to where full blocks alone reach: vLLM gives those away at once, and so do we.
    assert twin.computed < 24
    assert all(num_tokens for _, num_tokens in scheduled)
    server.run([(running, num_tokens) for running, num_tokens in scheduled if num_tokens])
    server.check([first, twin])
    server.manager.new_step_starts()
    later = server.add(ONE_IMAGE)
    assert server.schedule(later, 90) == 2


def test_tails_of_a_request_that_is_gone_are_forgotten() -> None:
    server = Server(LAYOUTS[0], num_blocks=60)
    server.manager.new_step_starts()
    gone = server.add(ONE_IMAGE)
    num_tokens = server.schedule(gone, 90)
    assert num_tokens
    server.run([(gone, num_tokens)])
    server.free(gone)
    server.manager.new_step_starts()
    later = server.add(ONE_IMAGE)
    server.schedule(later, 90)
    assert later.computed < 24
