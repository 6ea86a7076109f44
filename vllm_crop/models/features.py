# SPDX-License-Identifier: Apache-2.0
"""Visual features of images that were seen lately, kept for the next question.

vLLM's encoder cache cannot keep them: its entries are the compressed embeddings of one region. torch only.
"""

import torch
from cachetools import LRUCache

ImageKey = tuple[int, ...]
_WINDOW_KEY = 6  # the length of a key that ends with a window


class FeatureCache(LRUCache[ImageKey, torch.Tensor]):
    """Features of recent images, bounded by bytes, so that another question runs no vision tower.

    The bound is reserved as one block until the first entry arrives. vLLM sizes the KV cache in between,
    so the memory is accounted for. Tensor-parallel ranks see the same calls and keep the same entries.
    """

    def __init__(self, max_bytes: int, device: torch.device | str) -> None:
        """Reserve `max_bytes` on `device`; 0 stores nothing."""
        super().__init__(max_bytes, getsizeof=lambda features: features.numel() * features.element_size())
        self.num_hits = 0
        # Keys of windows by the two words that name their picture at one scale, in order.
        self._windows: dict[ImageKey, dict[ImageKey, None]] = {}
        self._reserve: torch.Tensor | None = torch.empty(max_bytes, dtype=torch.uint8, device=device)

    def find(self, key: ImageKey) -> torch.Tensor | None:
        """The features `[num_tokens, hidden]` stored under `key`, or None."""
        features = self.get(key)
        self.num_hits += features is not None
        return features

    def find_larger(self, key: ImageKey) -> torch.Tensor | None:
        """The features of a window of a picture, cut out of those of a larger window.

        They saw more of the picture than the window's own would have: what is found depends on what was asked
        before.

        Args:
            key: two words that name the picture at one scale, then the window, `row0, row1, col0, col1`; None
                is found under keys of other kinds.
        """
        if len(key) != _WINDOW_KEY:
            return None
        row0, row1, col0, col1 = key[2:]
        for stored in self._windows.get(key[:2], ()):
            top, bottom, left, right = stored[2:]
            if top <= row0 and row1 <= bottom and left <= col0 and col1 <= right:
                features = self.find(stored)
                assert features is not None
                grid = features.unflatten(0, (bottom - top, right - left))
                return grid[row0 - top : row1 - top, col0 - left : col1 - left].flatten(0, 1)
        return None

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._windows.clear()

    def __delitem__(self, key: ImageKey) -> None:
        """Forget an entry."""
        super().__delitem__(key)
        windows = self._windows.get(key[:2])
        if windows is not None:
            windows.pop(key, None)
            if not windows:
                del self._windows[key[:2]]

    def store(self, key: ImageKey, features: torch.Tensor) -> None:
        """Keep a copy of one image's features; nothing under an empty key, and nothing too large."""
        if not key or key in self or self.getsizeof(features) > self.maxsize:
            return
        self._reserve = None
        if len(key) == _WINDOW_KEY:
            self._windows.setdefault(key[:2], {})[key] = None
        # A view would keep the whole batch it was computed in alive.
        self[key] = features.clone()
