# SPDX-License-Identifier: Apache-2.0
"""Answers by plain transformers to pictures compressed in several ways, learned queries among them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lab.evaluation.asking import SceneTask
from lab.evaluation.conditions import Condition
from lab.evaluation.crop_pruning import pooled
from lab.evaluation.runner.method import Kept, Pruning, Sight
from lab.evaluation.transformers_answers import TransformersAnswers
from vllm_crop.compression.weights import read_resampler
from vllm_crop.config import CropConfig
from vllm_crop.models.plan_fields import assignment, places
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import ImageTokens, Region
from vllm_crop.planning.plan import Compression, TokenPlan, even_plan, make_plan


class CompressedAnswers(TransformersAnswers):
    """TransformersAnswers whose condition "plc" says in its configuration how pictures are compressed."""

    def __init__(self, checkpoint: Path | str, weights: Path) -> None:
        super().__init__(checkpoint, ())
        self.resampler = read_resampler(weights)

    def _crop_groups(self, condition: Condition, task: SceneTask, texts: list[str]) -> Iterator[Any]:
        seen = self.see(task.scene.scene)
        evenly = condition.region == "evenly"
        rim = CropConfig().rim if (condition.region or "").endswith("rim") else 0.0
        plans = {
            index: plan_for(seen.grid, region, condition, rim)
            for index, region in enumerate(task.regions)
            if region is not None or evenly
        }
        if plans:
            yield self._on_picture(plans, texts, seen, self._pruning(list(plans.values())))
        if whole := [index for index in range(len(texts)) if index not in plans]:
            yield self._on_picture(whole, texts, seen, Pruning())

    def _pruning(self, plans: list[TokenPlan]) -> Pruning:
        def before(sight: Sight) -> Kept:
            rows = [self._compressed(sight.image.features, plan) for plan in plans]
            tokens = torch.stack([torch.tensor(plan.position).long() for plan in plans])
            return Kept(torch.stack(rows), tokens)

        return Pruning(before)

    def _compressed(self, features: Tensor, plan: TokenPlan) -> Tensor:
        if plan.zone is None:
            return pooled(features, plan)
        rows: Tensor = self.resampler(features, assignment(plan), places(plan))
        return rows


def plan_for(grid: ImageTokens, region: Region | None, condition: Condition, rim: float) -> TokenPlan:
    """The plan that a server would make; without a region, of all of the picture alike."""
    assert condition.pruning_rate is not None
    compression = cast(Compression, condition.configuration)
    if region is None:
        return even_plan(grid, retained_count(grid.num_tokens, condition.pruning_rate), compression)
    around = region.widened(rim) if rim else None
    return make_plan(grid, region, condition.pruning_rate, compression, around=around)
