# SPDX-License-Identifier: Apache-2.0
"""Images, questions and attentions made by hand, for rivals whose right choice is known."""

import torch
from torch import Tensor

from lab.evaluation.runner.method import Heads, LayerView, Rows, Seen, Sight
from vllm_crop.planning.geometry import TokenGrid

NOTHING = torch.empty(0)


def image_of(
    features: Tensor,
    received: Tensor = NOTHING,
    grid: TokenGrid | None = None,
    keys: Tensor = NOTHING,
    early: Tensor = NOTHING,
    tower: Tensor | None = None,
    fingerprint: int = 0,
    attention: Tensor = NOTHING,
    entropy: Tensor = NOTHING,
) -> Seen:
    """An image of tokens in a row; what the tower made of them is what the model receives, if not said."""
    grid = grid or TokenGrid(1, len(features))
    tower = features if tower is None else tower
    return Seen(features, grid, keys, received, early, attention, tower, entropy, fingerprint)


def sight_of(image: Seen, *questions: Tensor, spelled: tuple[str, ...] = ()) -> Sight:
    """Questions that are words from end to end."""
    return Sight(image, questions, (spelled,) * len(questions), questions, NOTHING, None)


def view_of(
    scores: Tensor,
    lengths: list[int],
    others: float = 0.0,
    coming: Tensor | None = None,
    image_values: Tensor = NOTHING,
    text_values: Tensor = NOTHING,
    text_keys: Tensor = NOTHING,
    image_rows: Rows | None = None,
    text_rows: Rows | None = None,
    unrotated: Tensor | None = None,
    layer: int = 1,
) -> LayerView:
    """A view whose attention scores `[questions, heads, length, visual]` are these: keys are unit vectors."""
    questions, heads, length, visual = scores.shape
    keys = torch.eye(visual).expand(1, heads, -1, -1)
    rest = torch.full((questions, heads, length, 1), others)
    words = torch.arange(length) < torch.tensor(lengths)[:, None]

    def project(rotated: bool) -> LayerView:
        found = coming if rotated else unrotated
        assert found is not None, "nobody may look at the next layer"
        return view_of(found, lengths, others)

    nothing = Rows(NOTHING, NOTHING, NOTHING)
    return LayerView(
        layer,
        Heads(scores * visual**0.5, text_keys, text_values),
        Heads(NOTHING, keys, image_values),
        rest,
        torch.tensor(lengths),
        words,
        text_rows or nothing,
        image_rows or nothing,
        lambda states: states,
        project,
    )
