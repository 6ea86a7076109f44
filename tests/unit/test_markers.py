# SPDX-License-Identifier: Apache-2.0
"""Marker ids: ids that no text can hold."""

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.eviction.markers import EvictionSettings, Unmarked, attach_eviction, choose_marker_ids


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.sets(st.integers(0, 45)),
    st.lists(st.integers(0, 45), unique=True, max_size=5),
)
def test_padded_rows_come_first_then_reserved_tokens(
    num_stages: int, vocab_size: int, known: set[int], reserved: list[int]
) -> None:
    tokenizer_ids = known | set(reserved)
    padded = set(range(vocab_size)) - tokenizer_ids
    spare = [token for token in reserved if token < vocab_size]
    if len(padded) + len(spare) < num_stages:
        with pytest.raises(UnsupportedModelError):
            choose_marker_ids(num_stages, vocab_size, tokenizer_ids, reserved)
        return

    chosen = choose_marker_ids(num_stages, vocab_size, tokenizer_ids, reserved)

    assert len(chosen) == len(set(chosen)) == num_stages
    assert all(0 <= token < vocab_size for token in chosen)
    num_padded = min(num_stages, len(padded))
    assert set(chosen[:num_padded]) <= padded, "padded rows come first"
    assert list(chosen[num_padded:]) == spare[: num_stages - num_padded]


def test_the_choice_is_the_same_in_every_process() -> None:
    assert choose_marker_ids(3, 10, {0, 1, 2, 3}) == choose_marker_ids(3, 10, [3, 2, 1, 0]) == (9, 8, 7)


def test_a_vocabulary_in_use_to_the_last_id_is_refused_with_a_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match=r"needs 2 token id.*all 8 ids.*use method 'plc'"):
        choose_marker_ids(2, 8, range(8), spare_ids=[3, 8, 9])


class HfConfig:
    """What is read of a checkpoint's configuration."""

    def __init__(self, **ids: Any) -> None:
        self.ids = ids

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "llava", "image_token_index": None, **self.ids}

    def get_text_config(self) -> "HfConfig":
        return HfConfig()


def model_config(
    vocabulary: Mapping[str, int], vocab_size: int, skip_tokenizer_init: bool = False, **ids: Any
) -> Any:
    return SimpleNamespace(
        skip_tokenizer_init=skip_tokenizer_init,
        get_vocab_size=lambda: vocab_size,
        hf_config=HfConfig(**ids),
        vocabulary=vocabulary,
    )


@pytest.fixture
def _tokenizer_in_the_model_config(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = ModuleType("vllm.tokenizers")

    def cached_tokenizer_from_config(config: Any) -> Any:
        return SimpleNamespace(get_vocab=lambda: dict(config.vocabulary))

    tokenizers.cached_tokenizer_from_config = cached_tokenizer_from_config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.tokenizers", tokenizers)


@pytest.mark.usefixtures("_tokenizer_in_the_model_config")
@pytest.mark.parametrize(
    ("reserved", "expected"),
    [
        ("<|reserved_special_token_0|>", 1),
        ("<unused7>", 1),
        ("[unused99]", 1),
        ("<|placeholder_token_3|>", 1),
        ("<extra_id_0>", 1),
        ("<|image_pad|>", None),
        ("\u0120reserved", None),
        ("unused", None),
        ("<unreserved>", None),
        ("hello", None),
    ],
)
def test_reserved_tokens_are_known_by_their_names(reserved: str, expected: int | None) -> None:
    config = model_config({"the": 0, reserved: 1, "end": 2}, vocab_size=3)
    if expected is None:
        with pytest.raises(UnsupportedModelError):
            attach_eviction(config, (2,))
        return
    attach_eviction(config, (2,))
    assert EvictionSettings.from_hf_config(config.hf_config) == EvictionSettings((2,), (expected,))


@pytest.mark.usefixtures("_tokenizer_in_the_model_config")
def test_reserved_tokens_are_taken_in_order_after_padded_rows() -> None:
    vocabulary = {"<unused5>": 2, "<unused1>": 1, "the": 0}
    config = model_config(vocabulary, vocab_size=4)
    attach_eviction(config, (2, 4, 8))
    assert EvictionSettings.from_hf_config(config.hf_config).marker_ids == (3, 1, 2)


@pytest.mark.usefixtures("_tokenizer_in_the_model_config")
def test_what_the_model_uses_itself_is_never_a_marker() -> None:
    vocabulary = {"the": 0, "<|reserved_special_token_0|>": 1, "<unused5>": 2, "<unused6>": 3}
    ids = {"image_token_index": 1, "eos_token_id": [2, 0], "bos_token_id": 5}
    config = model_config(vocabulary, vocab_size=6, **ids)
    attach_eviction(config, (2, 4))
    assert EvictionSettings.from_hf_config(config.hf_config).marker_ids == (4, 3)


def test_without_a_tokenizer_there_are_no_labels() -> None:
    config = model_config({}, vocab_size=4, skip_tokenizer_init=True)
    attach_eviction(config, (2,))
    assert EvictionSettings.from_hf_config(config.hf_config) == EvictionSettings((2,), ())


@pytest.mark.parametrize(
    ("first_image", "length", "left"),
    [
        (2, 9, [1, 2, 7, 7, 7, 3, 4, 5, 6]),
        (0, 7, [7, 7, 7, 3, 4, 5, 6]),  # cut on the left, as vLLM does by default
        (1, 6, [2, 7, 7, 7, 3, 4]),
        (2, 5, [1, 2, 7, 7, 7]),  # on the right
        (3, 9, None),
        (0, 8, None),
    ],
)
def test_unmarked_ids_are_cut_as_the_prompt_was(
    first_image: int, length: int, left: list[int] | None
) -> None:
    assert Unmarked((1, 2, 7, 7, 7, 3, 4, 5, 6), 2).cut(first_image, length) == left
