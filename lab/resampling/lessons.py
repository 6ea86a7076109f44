# SPDX-License-Identifier: Apache-2.0
"""How a compressor is trained, and how the pictures of a step are compressed: around what is asked or not.

A server compresses around regions that somebody found, who errs, and whole pictures where a budget says so. A
compressor that had only seen true regions would learn that what is far away never matters.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

from vllm_crop.config import CropConfig
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import Box, ImageTokens, ImageView, Region
from vllm_crop.planning.plan import TokenPlan, even_plan, make_plan

RATES = (0.889, 0.926, 0.95, 0.97)
RIM, WITH_RIM = CropConfig().rim, 0.7  # and how often there is one
# How often a picture is compressed around what is asked for, around a box beside that, around all of itself
# (of which tokens are sampled), and evenly, which is rarer where a server rather shows a smaller picture.
LOCAL = {"true": 0.2, "moved": 0.3, "whole": 0.25, "even": 0.25}
GLOBAL = {"moved": 0.15, "whole": 0.4, "even": 0.45}

Recipe = Literal["answers", "match"]


@dataclass(frozen=True)
class Course:
    """How it is trained.

    Attributes:
        recipe: "answers" learns what is right, "match" what the unpruned model thinks.
        batch: questions a step.
        rates: of which each step has one.
    """

    recipe: Recipe = "answers"
    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 20261128
    rates: tuple[float, ...] = RATES
    cache_gib: float = 2.0


def plan_lesson(
    region: Region | None,
    grid: ImageTokens,
    view: ImageView,
    rate: float,
    chance: random.Random,
    resizes: bool = False,
) -> TokenPlan:
    """A plan for one picture, with the count that the rate says.

    Args:
        region: what is asked for; None if unknown.
        resizes: a picture that is to be few tokens without a region is shown smaller.
    """
    local = region is not None and region != Region.whole()
    kinds = LOCAL if local else GLOBAL
    (kind,) = chance.choices(list(kinds), list(kinds.values()))
    if kind == "even" and resizes and chance.random() < 0.5:
        kind = "whole"
    if kind == "even":
        return even_plan(grid, retained_count(grid.num_tokens, rate), "resampler")
    around = RIM if chance.random() < WITH_RIM else 0.0
    if kind == "whole":
        chosen: Region = Region.whole()
    elif kind == "true":
        assert region is not None
        chosen = region
    else:
        chosen = _beside(region, chance) if local and region is not None else _anywhere(chance)
    seen = view.project(chosen)
    if seen is None:  # out of sight
        return even_plan(grid, retained_count(grid.num_tokens, rate), "resampler")
    rim = view.project(chosen.widened(around)) if around else None
    return make_plan(grid, seen, rate, "resampler", around=rim)


def _beside(region: Region, chance: random.Random) -> Region:
    """Its boxes, each moved by up to its own size."""
    return Region(tuple(_moved(box, chance) for box in region.boxes))


def _moved(box: Box, chance: random.Random) -> Box:
    width, height = box.x1 - box.x0, box.y1 - box.y0
    x0 = min(max(box.x0 + chance.uniform(-width, width), 0.0), 1 - width)
    y0 = min(max(box.y0 + chance.uniform(-height, height), 0.0), 1 - height)
    return replace(box, x0=x0, y0=y0, x1=x0 + width, y1=y0 + height)


def _anywhere(chance: random.Random) -> Region:
    width, height = chance.uniform(0.1, 0.4), chance.uniform(0.1, 0.4)
    x0, y0 = chance.uniform(0, 1 - width), chance.uniform(0, 1 - height)
    return Region((Box(x0, y0, x0 + width, y0 + height),))
