# SPDX-License-Identifier: Apache-2.0
"""Which tokens of one prompt the later layers run without, and the arithmetic of their indices.

Three indices: `token_index` counts the prompt's tokens, `kv_index` the tokens kept up to a stage (the
position in that stage's KV sequence), slots are vLLM's. Stage 0 are the layers before the first eviction,
stage s those from the s-th eviction layer on; what a stage evicts stays away from all later ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]
_NONE: IndexArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class PromptEviction:
    """Evicted tokens of one prompt.

    Attributes:
        evicted: per stage the ascending token indices its layers run without; empty for stage 0.
    """

    evicted: tuple[IndexArray, ...]

    @cached_property
    def end(self) -> int:
        """One past the last token that any stage evicts; 0 if there is none."""
        return max((int(tokens[-1]) + 1 for tokens in self.evicted if len(tokens)), default=0)

    def num_evicted(self, stage: int, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens the stage runs without."""
        if num_tokens >= self.end:  # all of decoding, which asks many times a step
            return len(self.evicted[stage])
        return int(np.searchsorted(self.evicted[stage], num_tokens))

    def num_kept(self, stage: int, num_tokens: int) -> int:
        """KV entries the stage holds for the first `num_tokens` tokens."""
        return num_tokens - self.num_evicted(stage, num_tokens)

    def token_index(self, stage: int, kv_index: int) -> int:
        """The token whose KV entry is number `kv_index` of the stage."""
        return kv_index + int(np.searchsorted(self._kept_before[stage], kv_index, side="right"))

    def tokens_within(self, stage: int, start: int, stop: int) -> IndexArray:
        """The token indices in `[start, stop)` the stage runs without."""
        tokens = self.evicted[stage]
        return tokens[np.searchsorted(tokens, start) : np.searchsorted(tokens, stop)]

    @cached_property
    def _kept_before(self) -> tuple[IndexArray, ...]:
        # For the i-th evicted token the number of kept ones before it.
        return tuple(tokens - np.arange(len(tokens)) for tokens in self.evicted)


def from_leaving_stages(leaving: Sequence[tuple[int, IndexArray]], num_stages: int) -> PromptEviction:
    """Collect what leaves at each stage into what each stage runs without.

    Args:
        leaving: pairs of a stage (from 1 on) and the token indices that leave there, in any order.
        num_stages: eviction layers of the server.
    """
    evicted: list[IndexArray] = [_NONE]
    for stage in range(1, num_stages + 1):
        gone = [tokens for leaves_at, tokens in leaving if leaves_at <= stage]
        evicted.append(np.sort(np.concatenate([_NONE, *gone])))
    return PromptEviction(tuple(evicted))


def read_markers(
    prompt_token_ids: Sequence[int], placeholders: Iterable[tuple[int, int]], marker_ids: Sequence[int]
) -> PromptEviction | None:
    """The eviction a prompt asks for, None if it has no markers.

    Args:
        prompt_token_ids: the whole prompt.
        placeholders: offset and length of every image in it.
        marker_ids: one per stage.
    """
    leaving = []
    last = len(prompt_token_ids) - 1  # never evicted: its row gives the first answer token
    for offset, length in placeholders:
        ids = np.asarray(prompt_token_ids[offset : min(offset + length, last)])
        for stage, marker in enumerate(marker_ids, start=1):
            (found,) = np.nonzero(ids == marker)
            if len(found):
                leaving.append((stage, found.astype(np.int64) + offset))
    return from_leaving_stages(leaving, len(marker_ids)) if leaving else None
