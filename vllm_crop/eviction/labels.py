# SPDX-License-Identifier: Apache-2.0
"""Label ids: how an eviction travels inside the prompt's token ids.

Inside an image's placeholder range an id says only "an embedding goes here", so one of a few label ids can
stand for it and say at which stage the token leaves. Scheduler and workers read the same plan back from the
same ids, and block hashes tell different plans apart. Outside placeholder ranges a label means nothing.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from vllm_crop.errors import UnsupportedModelError


def choose_label_ids(
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


def write_labels(
    prompt_token_ids: list[int],
    token_indices: ArrayLike,
    leaves_at: ArrayLike,
    label_ids: Sequence[int],
) -> None:
    """Label one image's placeholders in place.

    Args:
        prompt_token_ids: the whole prompt.
        token_indices: where the image's embeddings go, in order.
        leaves_at: per embedding the stage it leaves at, 0 for never.

    Raises:
        ValueError: there are not as many of these as of those.
    """
    indices, stages = np.asarray(token_indices, dtype=np.int64), np.asarray(leaves_at, dtype=np.int64)
    if len(indices) != len(stages):
        raise ValueError(f"{len(stages)} embeddings leave or stay, the prompt has room for {len(indices)}")
    last = len(prompt_token_ids) - 1  # its row gives the first answer token: it stays in all layers
    leaving = (stages > 0) & (indices != last)
    labels = np.asarray(label_ids)[stages[leaving] - 1]
    for token_index, label in zip(indices[leaving].tolist(), labels.tolist(), strict=True):
        prompt_token_ids[token_index] = label
