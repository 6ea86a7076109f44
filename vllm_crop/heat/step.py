# SPDX-License-Identifier: Apache-2.0
"""Which rows of an engine step belong to requests for heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_crop.heat.request import (
    CELLS,
    EXTRA_ARG,
    LARGEST_WEIGHT,
    LAYERS,
    LEAVES,
    MAX_CELLS,
    NUM_CELLS,
    RING,
    WEIGHTS,
)

Indices = NDArray[np.int64]


@dataclass
class HeatRequest:
    """A request as a worker holds it.

    Attributes:
        num_prompt_tokens: the last of them is where the answer begins: its attention is the map.
        image_tokens: `[num_embeddings]`, where in the prompt the image's embeddings are.
        cells: `[num_embeddings]`.
        leaves: whether it skips the layers after the last one that is watched, where it can.
        layers: those of the watched ones that the map is made of; None for all.
        weights: of each of these, ascending; None for the maximum.
        keys: per layer those of earlier steps, `[tokens, heads, size]` each, of a prompt in chunks.
    """

    num_prompt_tokens: int
    image_tokens: Indices
    cells: Indices
    num_cells: int
    leaves: bool = False
    layers: frozenset[int] | None = None
    weights: tuple[float, ...] | None = None
    keys: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _tokens: torch.Tensor | None = None

    def tokens_on(self, device: torch.device) -> torch.Tensor:
        """`image_tokens` on the workers' device, copied once for all layers."""
        if self._tokens is None:
            self._tokens = torch.from_numpy(self.image_tokens).to(device, non_blocking=True)
        return self._tokens

    @classmethod
    def of(cls, sampling: Any, num_prompt_tokens: int, placeholders: Sequence[Indices]) -> Self | None:
        """Read it from a request's SamplingParams; None for any other request.

        Args:
            placeholders: per image of the prompt the tokens that take an embedding.
        """
        asked = (getattr(sampling, "extra_args", None) or {}).get(EXTRA_ARG)
        # Anyone who may set extra arguments can send this: what does not fit is an ordinary request.
        if not isinstance(asked, Mapping) or len(placeholders) != 1:
            return None
        cells, num_cells = asked.get(CELLS), asked.get(NUM_CELLS)
        if not isinstance(num_cells, int) or not 0 < num_cells <= MAX_CELLS or not isinstance(cells, list):
            return None
        if len(cells) != len(placeholders[0]) or not all(
            isinstance(cell, int) and RING <= cell < num_cells for cell in cells
        ):
            return None
        layers, weights = asked.get(LAYERS), asked.get(WEIGHTS)
        if layers is not None and not (
            isinstance(layers, list) and layers and all(isinstance(layer, int) for layer in layers)
        ):
            return None
        if weights is not None and not (layers is not None and _are_weights(weights, layers)):
            return None
        return cls(
            num_prompt_tokens,
            placeholders[0],
            np.array(cells, dtype=np.int64),
            num_cells,
            # A second token would need all layers of the first ones.
            asked.get(LEAVES) is True and getattr(sampling, "max_tokens", None) == 1,
            None if layers is None else frozenset(layers),
            None if weights is None else tuple(map(float, weights)),
        )

    def reads(self, layer: int) -> bool:
        """Whether the map is made of this layer too."""
        return self.layers is None or layer in self.layers


def _are_weights(weights: Any, layers: list[int]) -> bool:
    """Whether each of the layers, which are ascending, has one."""
    return (
        isinstance(weights, list)
        and len(weights) == len(layers)
        and all(one < other for one, other in pairwise(layers))
        # NaN fails the comparison.
        and all(isinstance(one, int | float) and abs(one) <= LARGEST_WEIGHT for one in weights)
    )


@dataclass(frozen=True)
class HeatRows:
    """The rows of one of them in a step.

    Attributes:
        first: how many tokens of the prompt have been computed before.
        is_last: the prompt's last token is among them.
        batch_row: its place in the batch, and of its logits.
    """

    request: HeatRequest
    first: int
    num_rows: int
    is_last: bool
    batch_row: int


@dataclass(frozen=True)
class HeatStep:
    """A step with such requests.

    Attributes:
        starts: per stage of the decoder and request the first of its rows.
        all_leave: nobody in the step needs the layers after the last one that is read.
    """

    rows: tuple[HeatRows, ...]
    starts: tuple[tuple[int, ...], ...]
    all_leave: bool = False


def heat_step(
    requests: Sequence[HeatRequest | None],
    computed: Indices,
    scheduled: Indices,
    token_rows: Sequence[Indices | None] = (),
) -> HeatStep | None:
    """Find them in a step; None if there are none.

    Args:
        requests: per request of the batch, None for others.
        computed, scheduled: `[num_reqs]`, tokens before this step and of this step.
        token_rows: per later stage of the decoder the rows of the step that stay; None if all do.
    """
    if not any(requests):
        return None
    begins = np.cumsum(scheduled) - scheduled
    rows, starts = [], []
    for row, request in enumerate(requests):
        if request is None or computed[row] >= request.num_prompt_tokens:
            continue
        first, count = int(computed[row]), int(scheduled[row])
        rows.append(HeatRows(request, first, count, first + count >= request.num_prompt_tokens, row))
        starts.append(int(begins[row]))
    if not rows:
        return None
    # Nothing of such a request is evicted: its rows stay together and only move up.
    later = [starts if left is None else np.searchsorted(left, starts).tolist() for left in token_rows]
    all_leave = len(rows) == len(requests) and all(one.request.leaves for one in rows)
    return HeatStep(tuple(rows), (tuple(starts), *map(tuple, later)), all_leave)
