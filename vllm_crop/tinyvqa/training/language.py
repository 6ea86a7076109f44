# SPDX-License-Identifier: Apache-2.0
"""Second stage: the language model learns to answer and to locate.

Beside the answers it is told where to look: two heads of two layers are pulled towards the things that decide
the answer. Without that, connecting a name to its place takes many times as many questions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vllm_crop.tinyvqa import words
from vllm_crop.tinyvqa.training.batches import IGNORED, Batch, Task
from vllm_crop.tinyvqa.training.forward import (
    Layout,
    Looks,
    image_patches,
    language_states,
    make_layout,
    vision_features,
)

LOOKING_LAYERS = (3, 6)


@cache
def layout_of(side: int, questions: int, length: int, device: torch.device) -> Layout:
    """The layout of a task's batches, made once."""
    return make_layout(side, side, questions, length).to(device)


def answer_logits(
    model: Any, tokenizer: Any, batch: Batch, task: Task, train_vision: bool
) -> tuple[Tensor, list[Tensor]]:
    """`[scenes, questions, length, vocab]`, and where the answering tokens look."""
    side = task.num_tokens
    with torch.set_grad_enabled(train_vision and torch.is_grad_enabled()):
        features = vision_features(model.model.visual, image_patches(batch.images), side, side)
    prefix_ids = tokenizer.convert_tokens_to_ids([words.START, words.VISION_START])
    prefix = torch.tensor(prefix_ids, device=batch.questions.device)
    layout = layout_of(side, task.questions, task.length, prefix.device)
    looks = Looks(LOOKING_LAYERS, batch.answering)
    language = model.model.language_model
    states, looked = language_states(language, prefix, features, batch.questions, layout, looks)
    return model.lm_head(states), looked


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the answers' tokens."""
    return functional.cross_entropy(logits.flatten(0, 2), batch.targets.flatten(), ignore_index=IGNORED)


def look_loss(looked: list[Tensor], batch: Batch) -> Tensor:
    """Mean of minus the log of the attention that the places to look at get."""
    asked = batch.looks.any(-1)
    losses = []
    for log_attention in looked:
        mass = log_attention[:, :2].masked_fill(~batch.looks, float("-inf")).logsumexp(-1)
        losses.append(-mass[asked].mean())
    return torch.stack(losses).mean()


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
