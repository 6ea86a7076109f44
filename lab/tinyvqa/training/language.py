# SPDX-License-Identifier: Apache-2.0
"""Second stage: the language model learns to answer and to locate.

Beside the answers it is told where to look: two heads of two layers are pulled towards the things that decide
the answer, and what these heads see of a thumbnail is pulled to tell its row and column. Without that,
connecting a name to its place and a place to its numbers takes many times as many questions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.tinyvqa import words
from lab.tinyvqa.scenes import DIGITS
from lab.tinyvqa.training.batches import Batch, Task
from lab.tinyvqa.training.fewer import reduce_features
from lab.tinyvqa.training.forward import (
    PREFIX,
    Layout,
    Probes,
    States,
    image_patches,
    keep_tokens,
    language_states,
    make_layout,
    vision_features,
)
from lab.tinyvqa.training.labels import IGNORED
from vllm_crop.planning.geometry import GRID_CELLS

LOOKING_LAYERS = (3, 7)  # one for each stage of looking


@cache
def layout_of(side: int, questions: int, length: int, device: torch.device) -> Layout:
    """The layout of a task's batches, made once."""
    return make_layout(side, side, questions, length, device)


def answer_states(model: Any, tokenizer: Any, batch: Batch, task: Task, train_vision: bool) -> States:
    """What the model makes of a batch; its `lm_head` makes logits of them."""
    side = task.num_tokens
    with torch.set_grad_enabled(train_vision and torch.is_grad_enabled()):
        features = vision_features(model.model.visual, image_patches(batch.images), side, side)
    prefix_ids = tokenizer.convert_tokens_to_ids([words.START, words.VISION_START])
    prefix = torch.tensor(prefix_ids, device=batch.questions.device)
    layout = layout_of(side, task.questions, task.length, prefix.device)
    if task.pruning_rate:
        features, layout = reduce_features(features, batch.assignment), keep_tokens(layout, batch.kept)
    probes = Probes(LOOKING_LAYERS, batch.answering)
    return language_states(model.model.language_model, prefix, features, batch.questions, layout, probes)


class PlaceHeads(nn.Module):
    """Read row, column and digit off a token's state. Thrown away after the training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.row = nn.Linear(hidden, GRID_CELLS)
        self.column = nn.Linear(hidden, GRID_CELLS)
        self.digit = nn.Linear(hidden, len(DIGITS))

    def loss(self, states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Cross entropy of `[..., hidden]` states against `[...]` cells."""
        row, column = self.row(states).flatten(0, -2), self.column(states).flatten(0, -2)
        return functional.cross_entropy(row, rows.flatten(), ignore_index=IGNORED) + functional.cross_entropy(
            column, columns.flatten(), ignore_index=IGNORED
        )


def place_loss(heads: PlaceHeads, states: States, batch: Batch, task: Task) -> tuple[Tensor, Tensor]:
    """How well tokens tell where they are, and answering tokens where to look next.

    Image tokens are to know their cell, which rotations alone hardly tell. An answering token is to know the
    cell that decides before the layer that looks at it; the same heads read both, so that the two can meet.
    """
    cells = torch.arange(task.num_tokens, device=batch.places.device) * task.side // task.num_tokens
    row, column = (
        part.flatten().repeat(len(batch.places)) for part in torch.meshgrid(cells, cells, indexing="ij")
    )
    own = torch.stack([heads.loss(state, row, column) for state in states.image]).mean()
    return own, heads.loss(states.asking[-1], batch.places[..., 0], batch.places[..., 1])


def digit_loss(heads: PlaceHeads, states: States, batch: Batch) -> Tensor:
    """How well image tokens tell their digit, and answering tokens the one to look for, in the same words.

    Without it the model does not begin to search by a digit within 25 thousand questions.
    """
    seen, asked = heads.digit(states.image[0]).flatten(0, 1), heads.digit(states.asking[0]).flatten(0, 1)
    losses = [
        functional.cross_entropy(logits, target.flatten(), ignore_index=IGNORED)
        for logits, target in ((seen, batch.digits), (asked, batch.asked_digits))
        if bool((target != IGNORED).any())
    ]
    return torch.stack(losses).mean() if losses else states.last.new_zeros(())


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the answers' tokens."""
    return functional.cross_entropy(logits.flatten(0, 2), batch.targets.flatten(), ignore_index=IGNORED)


def look_loss(looked: list[Tensor], batch: Batch) -> Tensor:
    """Mean of minus the log of the attention that the places to look at get, stage by stage."""
    losses = []
    for log_attention, looks in zip(looked, batch.looks, strict=True):
        mass = log_attention[:, :2, :, PREFIX:].masked_fill(~looks, float("-inf")).logsumexp(-1)
        losses.append(-mass[looks.any(-1)].mean())
    return torch.stack(losses).mean()


def count_loss(states: States, batch: Batch) -> Tensor:
    """How well the first looking layer shares its attention out between the things to count and the prefix.

    Attention averages, so it cannot add up. But where each of n things gets as much as the prefix, the prefix
    gets 1 / (n + 1), and that can be read.
    """
    if not bool(batch.counting.any()):
        return states.last.new_zeros(())
    log_attention = states.looked[0][:, :2].transpose(1, 2)[batch.counting]  # [n, heads, tokens]
    counted = batch.counted[batch.counting][:, None]
    mass = log_attention[..., :PREFIX].logsumexp(-1) + (log_attention[..., PREFIX:] * counted).sum(-1)
    share: Tensor = -(mass / (counted.sum(-1) + 1)).mean()
    return share


def right_answers(logits: Tensor, batch: Batch) -> dict[str, tuple[int, int]]:
    """By family: answers whose every token is the likeliest, and all."""
    answered = batch.targets != IGNORED
    right = ((logits.argmax(-1) == batch.targets) | ~answered).all(-1)
    counts: dict[str, tuple[int, int]] = {}
    for scene, families in enumerate(batch.families):
        for index, family in enumerate(families):
            done, total = counts.get(family, (0, 0))
            counts[family] = (done + int(right[scene, index]), total + 1)
    return counts
