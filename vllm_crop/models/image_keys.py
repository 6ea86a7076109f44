# SPDX-License-Identifier: Apache-2.0
"""Names under which caches keep what is made of an image: of all it depends on, none that clients choose."""

import hashlib
from collections.abc import Sequence

import torch

from vllm_crop.planner import ImageDecision
from vllm_crop.planning.foveation import Piece
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.request import ImageRequest

_NO_KEY = torch.empty(0, 2, dtype=torch.int64)


def hash_of(
    image_hash: str, plan: TokenPlan | None, decision: ImageDecision, settings: tuple[str | None, ...]
) -> str:
    """The cache key of what the encoder makes of an image; stock vLLM's where that is stock embeddings."""
    if plan is None:
        return image_hash
    if not plan.compresses:  # all tokens, and not as stock vLLM has them
        return hashlib.blake2b(repr((image_hash, "all-1")).encode(), digest_size=32).hexdigest()
    return hash_with_request(image_hash, decision.request, settings, decision.pieces, plan.num_embeddings)


def hash_with_request(
    image_hash: str,
    request: ImageRequest,
    settings: tuple[str | None, ...],
    pieces: Sequence[Piece],
    num_embeddings: int,
) -> str:
    """Images not compressed keep the hash stock vLLM gives them; any region gets a key of its own.

    Args:
        settings: the server's that change what is found by the hash, where KV entries are kept longer than
            it runs: position ids change them, if not the image's embeddings.
    """
    request_key = request.cache_key()
    if request_key is None:
        return image_hash
    if request.region is None:  # all of it alike: whatever bound has led to as many tokens
        request_key = ("even-1", request.compression, num_embeddings)
    seen = tuple(piece.as_numbers() for piece in pieces)
    key = repr((image_hash, request_key, settings, seen))
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def piece_keys(image_hash: str, pieces: Sequence[Piece]) -> torch.Tensor:
    """`[pieces, 2]`, words that name an image at the scale of each piece; not its window."""
    names = (f"{image_hash} at {piece.scale.rows} x {piece.scale.cols}" for piece in pieces)
    return torch.cat([image_key(name) for name in names])


def image_key(image_hash: str) -> torch.Tensor:
    """`[1, 2]`, 64-bit words that name an image's pixels, or `[0, 2]` for an image not to be remembered."""
    if not image_hash:
        return _NO_KEY
    digest = hashlib.blake2b(image_hash.encode(), digest_size=16).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.int64).reshape(1, 2)
