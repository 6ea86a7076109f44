# SPDX-License-Identifier: Apache-2.0
"""First lesson of the language model: at each token of a value, how its row and its column are called.

It says nothing about questions and supervises no attention: what a token is taught is its own place in the
table, which is the same whatever is asked.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lab.pages.asking import cells_of
from lab.pages.browser import Page, PixelBox
from lab.pages.documents import CODES
from lab.pages.training.letters import IGNORED
from lab.tinyvqa.checkpoint import TOKEN

BEFORE_LAYER = 6
NAMES = ("row", "column")
MOST_IDS = 8  # token ids of a name


def name_labels(
    page: Page, rows: int, cols: int, scale: tuple[float, float], encode: Callable[[str], Sequence[int]]
) -> NDArray[np.int64]:
    """`[rows, cols, len(NAMES), MOST_IDS]`: token ids of names in small letters, IGNORED beyond them.

    Tokens that show no letter of a value have IGNORED alone.

    Args:
        scale: of the picture, by which pixels of the page are multiplied, across and down.
    """
    labels = np.full((rows, cols, len(NAMES), MOST_IDS), IGNORED)
    places = np.array([[each.x, each.y] for each in page.letters]).reshape(-1, 2)
    tokens = (places * scale // TOKEN).astype(int)
    for box, names in _named(page):
        inside = ((places >= box[:2]) & (places <= box[2:])).all(axis=1)
        for col, row in tokens[inside]:
            if row >= rows or col >= cols or labels[row, col, 0, 0] != IGNORED:
                continue
            for index, name in enumerate(names):
                ids = encode(f" {name.lower()}")[:MOST_IDS]
                labels[row, col, index, : len(ids)] = ids
    return labels


def _named(page: Page) -> list[tuple[PixelBox, tuple[str, ...]]]:
    """Boxes of values, each with the names of its row and its column."""
    found: list[tuple[PixelBox, tuple[str, ...]]] = []
    for cell in cells_of(page):
        sheet = page.document.sheets[cell.sheet]
        found.append((cell.boxes[1], (sheet.rows[cell.row][0], sheet.columns[cell.column].name)))
    for index, (code, _) in enumerate(page.document.codes):
        box = page.boxes.get(f"{CODES}.{index}.0")
        if box is not None:
            found.append((box, (code,)))
    return found


class NameHeads(nn.Module):
    """Read names off states within the language model. Thrown away after the training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.names = nn.ModuleList(nn.Linear(hidden, hidden) for _ in NAMES)

    def loss(self, states: Tensor, labels: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and of each kind of name the share of tokens whose likeliest id is in their name.

        Args:
            states: `[batch, tokens, hidden]`.
            labels: `[batch, tokens, len(NAMES), MOST_IDS]`.
            embeddings: `[ids, hidden]`, of the language model.
        """
        normed = functional.layer_norm(states, states.shape[-1:])
        losses, right = [], {}
        for index, (name, head) in enumerate(zip(NAMES, self.names, strict=True)):
            ids = labels[:, :, index]
            said = ids[..., 0] != IGNORED
            chances = functional.log_softmax((head(normed[said]) @ embeddings.T).float(), dim=-1)
            known = ids[said] != IGNORED
            picked = chances.gather(1, ids[said].clamp(min=0)) * known
            losses.append(-(picked.sum(1) / known.sum(1)).sum() / said.sum().clamp(min=1))
            likeliest = chances.argmax(1, keepdim=True)
            found = ((ids[said] == likeliest) & known).any(1).float().sum()
            right[name] = found / said.sum().clamp(min=1)
        return torch.stack(losses).sum(), right
