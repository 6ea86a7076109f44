# SPDX-License-Identifier: Apache-2.0
"""Marker ids: how an eviction travels inside the prompt's token ids.

Inside an image's placeholder range an id says only "an embedding goes here", so one of a few marker ids can
stand for it and say at which stage the token leaves. Scheduler and workers read the same plan back from the
same ids, and block hashes tell different plans apart. Outside placeholder ranges a marker means nothing.

Layers and ids are settled while the model's configuration is made and travel in the HF config.
"""

import importlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.planning.plan import NEVER


def choose_marker_ids(
    num_stages: int, vocab_size: int, tokenizer_ids: Collection[int], spare_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """One id per stage that no text can hold, so that no penalty ever counts it against a word.

    Padded rows of the embedding matrix come first (the tokenizer has no token for them), then ids of tokens
    reserved for nothing.

    Args:
        num_stages: eviction layers of the server.
        vocab_size: rows of the embedding matrix; vLLM accepts no id beyond.
        tokenizer_ids: every id the tokenizer knows.
        spare_ids: ids of tokens reserved for future use, such as `<|reserved_special_token_0|>`.

    Raises:
        UnsupportedModelError: there are not enough of them.
    """
    known = set(tokenizer_ids)
    unused = [token for token in range(vocab_size - 1, -1, -1) if token not in known][:num_stages]
    free = [*unused, *(token for token in spare_ids if token < vocab_size)]
    if len(free) < num_stages:
        raise UnsupportedModelError(
            f"eviction needs {num_stages} token id(s) that no text can hold, but all {vocab_size} ids of the "
            "model's vocabulary are in use: use method 'plc'"
        )
    return tuple(free[:num_stages])


def write_markers(
    prompt_token_ids: list[int],
    token_indices: ArrayLike,
    leaves_at: ArrayLike,
    marker_ids: Sequence[int],
) -> None:
    """Mark one image's placeholders in place.

    Args:
        prompt_token_ids: the whole prompt.
        token_indices: where the image's embeddings go, in order.
        leaves_at: per embedding the stage it leaves at, 0 for never.

    Raises:
        ValueError: there are not as many of these as of those.
    """
    indices, stages = np.asarray(token_indices), np.asarray(leaves_at)
    if len(indices) != len(stages):
        raise ValueError(f"{len(stages)} embeddings leave or stay, the prompt has room for {len(indices)}")
    last = len(prompt_token_ids) - 1  # its row gives the first answer token: it stays in all layers
    leaving = (stages > 0) & (indices != last)
    markers = np.asarray(marker_ids)[stages[leaving] - 1]
    for token_index, marker in zip(indices[leaving].tolist(), markers.tolist(), strict=True):
        prompt_token_ids[token_index] = marker


UNMARKED = "crop_unmarked"  # key of the engine's input, for an Unmarked


@dataclass(frozen=True)
class Unmarked:
    """A prompt's ids without the evictions that the server chose itself.

    Attributes:
        first_image: where its first image begins: vLLM may yet cut the prompt (`truncate_prompt_tokens`),
            on either side and never through an image.
    """

    ids: tuple[int, ...]
    first_image: int

    def cut(self, first_image: int, length: int) -> list[int] | None:
        """The ids of what is left of the prompt, None if it cannot have been cut from this one."""
        start = self.first_image - first_image
        return list(self.ids[start : start + length]) if 0 <= start <= len(self.ids) - length else None


STAGES, MARKER_IDS = "stages", "marker_ids"


@dataclass(frozen=True)
class EvictionSettings:
    """The same in every process of a server.

    Attributes:
        stages: eviction layers, ascending; empty if nothing is ever evicted.
        marker_ids: per stage the token id that marks what leaves there.
    """

    stages: tuple[int, ...]
    marker_ids: tuple[int, ...]

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> Self:
        """Read what `attach` has written."""
        written = getattr(hf_config, "crop_eviction", None) or {STAGES: (), MARKER_IDS: ()}
        return cls(tuple(written[STAGES]), tuple(written[MARKER_IDS]))

    def attach(self, hf_config: Any) -> None:
        """Write the settings into the HF config."""
        hf_config.crop_eviction = {STAGES: list(self.stages), MARKER_IDS: list(self.marker_ids)}

    def stages_leaving_at(self, layers: NDArray[np.int32]) -> NDArray[np.int64]:
        """The stage that begins at each of some eviction layers, 0 for NEVER.

        Raises:
            ValueError: no stage begins at one of them.
        """
        stages = np.zeros(len(layers), dtype=np.int64)
        for stage, layer in enumerate(self.stages, start=1):
            stages[layers == layer] = stage
        strangers = layers[(stages == 0) & (layers != NEVER)]
        if len(strangers):
            named = sorted(set(strangers.tolist()))
            raise ValueError(f"layers {named} are none of the stages {list(self.stages)}")
        return stages


def embed_indices(placeholder: Any) -> NDArray[np.int64]:
    """The token indices in a placeholder range that take an embedding (vLLM's PlaceholderRange)."""
    if placeholder.is_embed is None:
        return np.arange(placeholder.offset, placeholder.offset + placeholder.length)
    within: NDArray[np.int64] = placeholder.is_embed.nonzero()[:, 0].numpy()
    return placeholder.offset + within


def image_placeholders(mm_features: Iterable[Any]) -> list[tuple[int, int]]:
    """Offset and length of every image in a prompt (vLLM's MultiModalFeatureSpec)."""
    return [
        (feature.mm_position.offset, feature.mm_position.length)
        for feature in mm_features
        if feature.modality == "image"
    ]


def image_embeddings(mm_features: Iterable[Any]) -> list[NDArray[np.int64]]:
    """Per image of a prompt the tokens that take an embedding."""
    return [embed_indices(feature.mm_position) for feature in mm_features if feature.modality == "image"]


# Tokens that checkpoints keep for later use: `<|reserved_special_token_0|>`, `<unused7>`, `[unused7]`.
_RESERVED = re.compile(r"(<\|?|\[)(reserved|unused|placeholder|extra_id)[\w-]*(\|?>|\])")


def attach_eviction(model_config: Any, stages: tuple[int, ...]) -> None:
    """Write the server's EvictionSettings into the HF config.

    Raises:
        UnsupportedModelError: the vocabulary has no id to spare.
    """
    if model_config.skip_tokenizer_init:
        marker_ids: tuple[int, ...] = ()  # refused once the engine's configuration is complete
    else:
        tokenizer = importlib.import_module("vllm.tokenizers").cached_tokenizer_from_config(model_config)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        used = _used_by_model(model_config.hf_config)
        spare = sorted(
            token_id
            for token, token_id in vocabulary.items()
            if _RESERVED.fullmatch(token) and token_id not in used
        )
        known = {*vocabulary.values(), *used}
        marker_ids = choose_marker_ids(len(stages), model_config.get_vocab_size(), known, spare)
    EvictionSettings(stages, marker_ids).attach(model_config.hf_config)


def _used_by_model(hf_config: Any) -> set[int]:
    """Ids the model's own configuration gives a meaning: images, beginning, end, padding."""
    configs = (hf_config.to_dict(), hf_config.get_text_config().to_dict())
    used: set[int] = set()
    for key, value in (entry for config in configs for entry in config.items()):
        if key.endswith(("token_id", "token_index")) and value is not None:
            used |= set(value if isinstance(value, list) else [value])
    return used
