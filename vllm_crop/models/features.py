# SPDX-License-Identifier: Apache-2.0
"""Vision features of recent images, so that a second question about an image runs no vision tower.

vLLM's encoder cache cannot do this: its entries are the compressed embeddings of one region.
"""

from collections import OrderedDict

import torch

ImageKey = tuple[int, ...]


class FeatureCache:
    """Least recently used features, bounded by bytes; an empty key is never stored.

    The bound is reserved as one block until the first entry arrives. vLLM sizes the KV cache in between,
    so the memory is accounted for. Tensor-parallel ranks see the same calls and keep the same entries.
    """

    def __init__(self, max_bytes: int, device: torch.device | str) -> None:
        """Reserve `max_bytes` on `device`; 0 stores nothing."""
        self.max_bytes = max_bytes
        self.num_hits = 0
        self._bytes = 0
        self._entries: OrderedDict[ImageKey, torch.Tensor] = OrderedDict()
        self._reserve: torch.Tensor | None = torch.empty(max_bytes, dtype=torch.uint8, device=device)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: ImageKey) -> torch.Tensor | None:
        """The features `[num_tokens, hidden]` stored under `key`, or None."""
        features = self._entries.get(key)
        if features is not None:
            self._entries.move_to_end(key)
            self.num_hits += 1
        return features

    def put(self, key: ImageKey, features: torch.Tensor) -> None:
        """Store a copy of one image's features, evicting the least recently used ones."""
        size = features.numel() * features.element_size()
        if not key or key in self._entries or size > self.max_bytes:
            return
        self._reserve = None
        while self._bytes + size > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= dropped.numel() * dropped.element_size()
        # A view would keep the whole batch it was computed in alive.
        self._entries[key] = features.clone()
        self._bytes += size

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._entries.clear()
        self._bytes = 0


def compress(features: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Average the features of each planned embedding; embeddings of one token are copied exactly.

    Sums run over sorted segments, so the result does not depend on the order of atomic additions.

    Args:
        features: `[num_tokens, hidden]`, visual tokens in row-major grid order.
        assignment: `[num_tokens]`, on the CPU; embedding index of each token, -1 for tokens left out
            (`TokenPlan.assignment`). Every index from 0 to the largest occurs.

    Returns:
        `[num_embeddings, hidden]` in the dtype of `features`; means are taken in float32.
    """
    order = torch.argsort(assignment, stable=True)
    order = order[(assignment < 0).sum() :]
    lengths = torch.bincount(assignment[order].long())
    selected = features[order.to(features.device)]
    if len(lengths) == len(order):
        return selected
    return torch.segment_reduce(selected.float(), "mean", lengths=lengths.to(features.device)).to(
        features.dtype
    )
