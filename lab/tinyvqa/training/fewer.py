# SPDX-License-Identifier: Apache-2.0
"""Pictures with fewer visual tokens, so that the model has seen such before it is pruned.

Half of them lose tokens as any method could drop them: what the questions need stays, of the rest a random
part. Half are pooled around what the questions need.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lab.tinyvqa.questions import Question
from vllm_crop.compression.pooling import compress
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.plan import make_plan


def choose_tokens(
    asked: Sequence[Sequence[Question]], side: int, num_tokens: int, rate: float, chance: random.Random
) -> tuple[Tensor, Tensor]:
    """What is left of each row's picture.

    Args:
        asked: per row, questions that name their boxes.
        side: cells in a row of the scene.
        num_tokens: visual tokens in a row of the picture.

    Returns:
        `[rows, num_tokens ** 2]` the index of what each token becomes part of, -1 for dropped ones, and
        `[rows, left]` the tokens whose places they keep.
    """
    grid = TokenGrid(num_tokens, num_tokens)
    plans = [_choose(questions, side, grid, rate, chance) for questions in asked]
    return torch.tensor([plan[0] for plan in plans]), torch.tensor([plan[1] for plan in plans])


def _choose(
    questions: Sequence[Question], side: int, grid: TokenGrid, rate: float, chance: random.Random
) -> tuple[list[int], list[int]]:
    region = Region(tuple(box for question in questions for box in question.region(side).boxes))
    inside, left = grid.mask(region), retained_count(grid.num_tokens, rate)
    needed, others = (mask.nonzero()[0].tolist() for mask in (inside, ~inside))
    if chance.random() < 0.5 or len(needed) > left:
        plan = make_plan(grid, region, rate, "pool")
        return plan.assignment.tolist(), plan.position.tolist()
    kept = sorted([*needed, *chance.sample(others, left - len(needed))])
    assignment = [-1] * grid.num_tokens
    for index, token in enumerate(kept):
        assignment[token] = index
    return assignment, kept


def reduce_features(features: Tensor, assignment: Tensor) -> Tensor:
    """`[pictures, tokens, hidden]` to `[rows, left, hidden]`; rows of one picture follow each other."""
    views = len(assignment) // len(features)
    return torch.stack(
        [compress(features[row // views], assigned) for row, assigned in enumerate(assignment.cpu())]
    )
