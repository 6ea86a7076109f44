# SPDX-License-Identifier: Apache-2.0
"""First stage: the vision tower learns to say, at each of its tokens, which thing the token belongs to."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.tinyvqa.checkpoint import TOKEN
from lab.tinyvqa.scenes import COLOURS, DIGITS, SHAPES, make_scene, training_seed
from lab.tinyvqa.training.batches import draw_all
from lab.tinyvqa.training.forward import image_patches, vision_features
from lab.tinyvqa.training.labels import IGNORED, token_labels

FULL_SIDE = 4  # cells: enough neighbours to tell apart, and cheap
FULL_SCENES, THUMBNAIL_SCENES = 6, 6
NUM_THINGS = {"full": (6, 14), "thumbnail": (12, 24)}


class TokenHeads(nn.Module):
    """Reads colour (or nothing), shape and digit off an embedding. Thrown away after the training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.colour = nn.Linear(hidden, len(COLOURS) + 1)
        self.shape = nn.Linear(hidden, len(SHAPES))
        self.digit = nn.Linear(hidden, len(DIGITS))


@dataclass(frozen=True)
class Labelled:
    """Images `[n, height, width, 3]` and what each of their tokens shows: `[n, tokens]` each."""

    images: Tensor
    colour: Tensor
    shape: Tensor
    digit: Tensor
    num_tokens: int


def labelled_scenes(kind: str, seed: int) -> Labelled:
    """`"full"` pictures, or `"thumbnail"`s, whose digits nobody can read."""
    chance = random.Random(seed)
    side, count = (FULL_SIDE, FULL_SCENES) if kind == "full" else (8, THUMBNAIL_SCENES)
    scenes = [make_scene(training_seed(chance), side, NUM_THINGS[kind]) for _ in range(count)]
    images = draw_all(scenes, thumbnails=kind == "thumbnail")
    num_tokens = images.shape[1] // TOKEN
    labels = np.stack([token_labels(scene, num_tokens) for scene in scenes])
    if kind == "thumbnail":
        labels[:, 2] = IGNORED
    colour, shape, digit = torch.from_numpy(labels).flatten(2).unbind(1)
    return Labelled(images, colour, shape, digit, num_tokens)


def tower_loss(visual: Any, heads: TokenHeads, labelled: Labelled) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the share of tokens read right by what is read."""
    side = labelled.num_tokens
    features = vision_features(visual, image_patches(labelled.images), side, side)
    loss, right = features.new_zeros(()), {}
    for name in ("colour", "shape", "digit"):
        target = getattr(labelled, name)
        if bool((target != IGNORED).any()):
            logits = getattr(heads, name)(features)
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED
            )
            known = target != IGNORED
            right[name] = float((logits.argmax(-1) == target)[known].float().mean())
    return loss, right
