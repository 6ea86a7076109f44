# SPDX-License-Identifier: Apache-2.0
"""First lesson of the vision tower: at each of its tokens, the letters whose middle lies in it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lab.pages.browser import Letter
from lab.tinyvqa.checkpoint import TOKEN

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-·"
NOTHING = len(ALPHABET)
IGNORED = -100
SLOTS = 4  # letters of a token, from left to right, those of its uppermost line first


def letter_labels(
    letters: Sequence[Letter], rows: int, cols: int, scale: tuple[float, float]
) -> NDArray[np.int64]:
    """`[rows, cols, SLOTS]`: indices into ALPHABET, NOTHING where there are fewer letters.

    Args:
        scale: of the picture, by which pixels of the page are multiplied, across and down.
    """
    found: dict[tuple[int, int], list[Letter]] = {}
    for each in letters:
        place = int(each.y * scale[1] // TOKEN), int(each.x * scale[0] // TOKEN)
        found.setdefault(place, []).append(each)
    labels = np.full((rows, cols, SLOTS), NOTHING)
    for (row, col), several in found.items():
        if row >= rows or col >= cols:
            continue
        several.sort(key=lambda each: (round(each.y * scale[1] / 6), each.x))
        for slot, each in enumerate(several[:SLOTS]):
            index = ALPHABET.find(each.letter)
            labels[row, col, slot] = index if index >= 0 else IGNORED
    return labels


class LetterHeads(nn.Module):
    """Read letters off embeddings. Thrown away after the training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.slots = nn.Linear(hidden, SLOTS * (len(ALPHABET) + 1))

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the share of letters that are read right.

        Args:
            features: `[batch, tokens, hidden]`.
            labels: `[batch, tokens, SLOTS]`.
        """
        logits = self.slots(features).unflatten(-1, (SLOTS, -1))
        # Most of a page is empty: what there is to read counts as much as all of it.
        weight = torch.where(labels == NOTHING, 0.2, 1.0) * (labels != IGNORED)
        losses = functional.cross_entropy(
            logits.flatten(0, 2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        letters = (labels != NOTHING) & (labels != IGNORED)
        right = (logits.argmax(-1) == labels)[letters].float().mean()
        return (losses * weight.flatten()).sum() / weight.sum(), right
