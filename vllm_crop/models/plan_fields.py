# SPDX-License-Identifier: Apache-2.0
"""What of a plan goes to the worker beside an image's pixels: fields of vLLM's multimodal kwargs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_crop.planning.foveation import Piece
from vllm_crop.planning.plan import TokenPlan, places_of

ASSIGNMENT, POSITIONS, IMAGE_KEY = "crop_assignment", "crop_positions", "crop_image_key"
PLAN_FIELDS = (ASSIGNMENT, POSITIONS, IMAGE_KEY)
PIECES = "crop_pieces"
PLACES = "crop_places"  # of servers with a resampler
CROP_FIELDS = (*PLAN_FIELDS, PIECES, PLACES)
_NOTHING = torch.empty(0, dtype=torch.int32)
NO_PLACES = torch.empty(0, 4, dtype=torch.int16)


def assignment(plan: TokenPlan | None) -> torch.Tensor:
    """`[num_tokens]`, or empty for an image that is not compressed."""
    return _NOTHING if plan is None else _tensor(plan.assignment)


def positions(plan: TokenPlan | None) -> torch.Tensor:
    """`[num_embeddings]`, or empty for an image that is not compressed."""
    return _NOTHING if plan is None else _tensor(plan.position)


def places(plan: TokenPlan | None) -> torch.Tensor:
    """`[num_tokens, 4]` as `vllm_crop.compression.reading` takes them, or empty for what is not resampled."""
    if plan is None or plan.zone is None:
        return NO_PLACES
    return torch.from_numpy(np.stack([plan.zone, *places_of(plan.grid)], axis=1).astype(np.int16))


def _tensor(array: NDArray[np.int32]) -> torch.Tensor:
    # A copy: plans are kept, and torch could write to what it shares.
    return torch.from_numpy(array.copy())


def piece_numbers(pieces: Sequence[Piece]) -> torch.Tensor:
    """`[pieces, 10]`, as the worker gets them."""
    return torch.tensor([piece.as_numbers() for piece in pieces], dtype=torch.int32).reshape(-1, 10)


def pieces_of(kwargs: Mapping[str, Any], num_images: int) -> list[tuple[Piece, ...]]:
    """What each image of a batch is seen in, in the worker; empty for those seen whole."""
    if PIECES not in kwargs:
        return [()] * num_images
    return [tuple(map(Piece.from_numbers, numbers.tolist())) for numbers in kwargs[PIECES]]
