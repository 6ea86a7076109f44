# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt a stage runs without: read from markers, counted, against brute force."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_crop.eviction.markers import EvictionSettings, embed_indices, image_placeholders, write_markers
from vllm_crop.eviction.prompt_eviction import PromptEviction, read_markers
from vllm_crop.planning.plan import NEVER

IMAGE_ID, MARKER_IDS = 100, (101, 102, 103)
TEXT_IDS = (1, 2, IMAGE_ID, *MARKER_IDS)  # a user may write every id


@dataclass(frozen=True)
class Prompt:
    """Token ids before marking, images, and per token the stage it shall leave at, 0 for never."""

    token_ids: list[int]
    placeholders: list[tuple[int, int]]
    leaves_at: list[int]
    num_stages: int

    @property
    def marker_ids(self) -> tuple[int, ...]:
        return MARKER_IDS[: self.num_stages]

    def evicted(self, stage: int) -> list[int]:
        """Token indices that the stage runs without."""
        return [token for token, leaves_at in enumerate(self.leaves_at) if 0 < leaves_at <= stage]

    def marked(self) -> list[int]:
        """The token ids with markers."""
        token_ids = list(self.token_ids)
        for offset, length in self.placeholders:
            inside = range(offset, offset + length)
            write_markers(token_ids, inside, [self.leaves_at[token] for token in inside], self.marker_ids)
        return token_ids

    def eviction(self) -> PromptEviction | None:
        """As scheduler and workers read it."""
        return read_markers(self.marked(), self.placeholders, self.marker_ids)


@st.composite
def prompts(draw: st.DrawFn, max_images: int = 3) -> Prompt:
    """Text that may hold any id around zero to `max_images` images, the last token not an image's."""
    num_stages = draw(st.integers(1, 3))
    text = st.lists(st.sampled_from(TEXT_IDS), max_size=6)
    image = st.lists(st.integers(0, num_stages), min_size=1, max_size=25)
    token_ids, leaves_at, placeholders = draw(text), [], []
    leaves_at += [0] * len(token_ids)
    for leaving in draw(st.lists(image, max_size=max_images)):
        placeholders.append((len(token_ids), len(leaving)))
        after = draw(text)
        token_ids += [IMAGE_ID] * len(leaving) + after
        leaves_at += leaving + [0] * len(after)
    return Prompt([*token_ids, 1], placeholders, [*leaves_at, 0], num_stages)


def stages(prompt: Prompt) -> range:
    return range(prompt.num_stages + 1)


@given(prompts())
@example(Prompt([101, 100, 100, 101, 1], [(1, 2)], [0, 0, 0, 0, 0], 1))
@example(Prompt([100, 100, 1], [(0, 2)], [2, 1, 0], 2))
def test_every_stage_reads_back_what_was_written(prompt: Prompt) -> None:
    eviction = prompt.eviction()

    if not any(prompt.leaves_at):
        assert eviction is None
        return
    assert eviction is not None
    assert [tokens.tolist() for tokens in eviction.evicted] == [prompt.evicted(s) for s in stages(prompt)]
    assert eviction.end == 1 + max(prompt.evicted(prompt.num_stages))


@given(prompts())
def test_markers_change_no_token_outside_images_and_none_that_stays(prompt: Prompt) -> None:
    for before, after, leaves_at in zip(prompt.token_ids, prompt.marked(), prompt.leaves_at, strict=True):
        assert after == (prompt.marker_ids[leaves_at - 1] if leaves_at else before)


@given(prompts(), st.integers(0, 20))
def test_counts_are_those_of_sets(prompt: Prompt, num_answer_tokens: int) -> None:
    eviction = prompt.eviction()
    if eviction is None:
        return
    for stage in stages(prompt):
        evicted = set(prompt.evicted(stage))
        for num_tokens in range(len(prompt.token_ids) + num_answer_tokens + 1):
            gone = len(evicted & set(range(num_tokens)))
            assert eviction.num_evicted(stage, num_tokens) == gone
            assert eviction.num_kept(stage, num_tokens) == num_tokens - gone


@given(prompts(), st.integers(0, 20))
def test_token_index_is_the_inverse_of_num_kept_on_kept_tokens(
    prompt: Prompt, num_answer_tokens: int
) -> None:
    eviction = prompt.eviction()
    if eviction is None:
        return
    for stage in stages(prompt):
        evicted = set(prompt.evicted(stage))
        kept = [token for token in range(len(prompt.token_ids) + num_answer_tokens) if token not in evicted]
        assert [eviction.token_index(stage, index) for index in range(len(kept))] == kept
        assert [eviction.num_kept(stage, token) for token in kept] == list(range(len(kept)))


@given(prompts(), st.data())
def test_tokens_within_a_chunk(prompt: Prompt, data: st.DataObject) -> None:
    eviction = prompt.eviction()
    if eviction is None:
        return
    start = data.draw(st.integers(0, len(prompt.token_ids)), label="start")
    stop = data.draw(st.integers(start, len(prompt.token_ids) + 5), label="stop")
    for stage in stages(prompt):
        expected = sorted(set(prompt.evicted(stage)) & set(range(start, stop)))
        assert eviction.tokens_within(stage, start, stop).tolist() == expected


@given(prompts())
def test_what_a_stage_evicts_stays_away_from_later_ones(prompt: Prompt) -> None:
    eviction = prompt.eviction()
    if eviction is None:
        return
    assert not len(eviction.evicted[0])
    sets = [set(tokens.tolist()) for tokens in eviction.evicted]
    assert all(earlier <= later for earlier, later in itertools.pairwise(sets))


@pytest.mark.parametrize("token_ids", [[101], [101, 102, 100, 103], [1, 100, 100, 101, 102]])
def test_markers_in_text_evict_nothing(token_ids: list[int]) -> None:
    assert read_markers(token_ids, [], MARKER_IDS) is None
    images = [(token_ids.index(100), token_ids.count(100))] if 100 in token_ids else []
    assert read_markers(token_ids, images, MARKER_IDS) is None


def test_markers_of_stages_the_server_does_not_have_evict_nothing() -> None:
    assert read_markers([102, 103, 1], [(0, 2)], (101,)) is None


def test_a_server_without_eviction_reads_nothing() -> None:
    assert read_markers([100, 101, 1], [(0, 2)], ()) is None


def test_the_last_prompt_token_stays_though_it_is_an_images() -> None:
    token_ids = [7, *[IMAGE_ID] * 4]
    write_markers(token_ids, [1, 2, 3, 4], [1, 2, 2, 2], MARKER_IDS)

    assert token_ids == [7, 101, 102, 102, IMAGE_ID]
    eviction = read_markers(token_ids, [(1, 4)], MARKER_IDS[:2])
    assert eviction is not None
    assert eviction.evicted[2].tolist() == [1, 2, 3]
    assert eviction.end == 4


def test_a_marker_on_the_last_token_evicts_nothing() -> None:
    """Nobody of ours writes one there, but a prompt of token ids can have it."""
    eviction = read_markers([7, MARKER_IDS[0], MARKER_IDS[0]], [(1, 2)], MARKER_IDS[:1])
    assert eviction is not None
    assert eviction.evicted[1].tolist() == [1]
    assert read_markers([7, MARKER_IDS[0]], [(1, 1)], MARKER_IDS[:1]) is None


def test_one_stage_per_embedding_is_needed() -> None:
    with pytest.raises(ValueError, match="1 embeddings leave or stay, the prompt has room for 2"):
        write_markers([100, 100, 1], [0, 1], [1], MARKER_IDS)


@given(st.integers(0, 50), st.lists(st.booleans(), min_size=1, max_size=30), st.booleans())
def test_embeddings_go_where_the_placeholder_has_them(offset: int, mask: list[bool], all_of_it: bool) -> None:
    is_embed = None if all_of_it else torch.tensor(mask)
    placeholder = SimpleNamespace(offset=offset, length=len(mask), is_embed=is_embed)

    found = embed_indices(placeholder)

    expected = [offset + index for index, takes_one in enumerate(mask) if takes_one or all_of_it]
    assert found.tolist() == expected


def test_only_images_are_looked_at() -> None:
    def feature(modality: str, offset: int, length: int) -> SimpleNamespace:
        return SimpleNamespace(modality=modality, mm_position=SimpleNamespace(offset=offset, length=length))

    features = [
        feature("image", 3, 5),
        feature("audio", 8, 2),
        feature("video", 10, 2),
        feature("image", 12, 1),
    ]
    assert image_placeholders(features) == [(3, 5), (12, 1)]


def test_settings_travel_in_the_hf_config() -> None:
    hf_config = SimpleNamespace()
    assert EvictionSettings.from_hf_config(hf_config) == EvictionSettings((), ())

    EvictionSettings((2, 5), MARKER_IDS[:2]).attach(hf_config)

    read = EvictionSettings.from_hf_config(hf_config)
    assert read == EvictionSettings((2, 5), MARKER_IDS[:2])


def test_stages_begin_at_eviction_layers() -> None:
    settings = EvictionSettings((2, 5), MARKER_IDS[:2])
    assert settings.stages_leaving_at(np.array([NEVER, 2, 5, 2])).tolist() == [0, 1, 2, 1]
    with pytest.raises(ValueError, match=r"layers \[3\] are none of the stages \[2, 5\]"):
        settings.stages_leaving_at(np.array([2, 3, NEVER]))
