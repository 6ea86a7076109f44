# SPDX-License-Identifier: Apache-2.0
"""How a plan travels to the worker: tensors beside an image's pixels, and the key of what comes of them."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_crop.params import ImageRequest
from vllm_crop.plan import TokenPlan

ASSIGNMENT, POSITIONS, IMAGE_KEY = "crop_assignment", "crop_positions", "crop_image_key"
CROP_FIELDS = (ASSIGNMENT, POSITIONS, IMAGE_KEY)
_NOTHING, _NO_KEY = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)


def hash_with_request(image_hash: str, request: ImageRequest, position_ids: str | None) -> str:
    """Images not compressed keep the hash stock vLLM gives them; any region gets a key of its own.

    Position ids do not change an image's embeddings, but the KV entries that are found by this hash.
    """
    request_key = request.cache_key()
    if request_key is None:
        return image_hash
    key = repr((image_hash, request_key, position_ids))
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def assignment(plan: TokenPlan | None) -> torch.Tensor:
    """`[num_tokens]`, or empty for an image that is not compressed."""
    return _NOTHING if plan is None else _tensor(plan.assignment)


def positions(plan: TokenPlan | None) -> torch.Tensor:
    """`[num_embeddings]`, or empty for an image that is not compressed."""
    return _NOTHING if plan is None else _tensor(plan.position)


def _tensor(array: NDArray[np.int32]) -> torch.Tensor:
    # A copy: plans are kept, and torch could write to what it shares.
    return torch.from_numpy(array.copy())


def image_key(image_hash: str) -> torch.Tensor:
    """Two 64-bit words that name the image's pixels, or empty for an image not to be remembered."""
    if not image_hash:
        return _NO_KEY
    digest = hashlib.blake2b(image_hash.encode(), digest_size=16).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.int64)
