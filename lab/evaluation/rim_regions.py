# SPDX-License-Identifier: Apache-2.0
"""Where the regions of the rim study come from: the truth, a little beside it, the served model, chance."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lab.evaluation.questions import TestScene
from lab.evaluation.regions import regions_for
from lab.tinyvqa.questions import Question
from vllm_crop.localizers.base import LocalizerAnswer, UnreadableAnswerError
from vllm_crop.localizers.decision import settle
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.request import Found

Asked = tuple[TestScene, Question]
SOURCES = {
    "exact": "the smallest region that holds the answer",
    "shifted": "every box of it moved by one of 8x8 cells",
    "attention": "where the served model looks",
    "attention, warm": "the same, and places twice as hot as the mean are kept as the rim is",
    "spoken": "where the served model says that it is",
    "random": "boxes of the true size, anywhere",
}
SPOKEN = LocalizerConfig(kind="engine", prompt="where:{question}")
WARM_ABOVE = 2.0


class Regions:
    """Finds them, with an engine that reads attention."""

    def __init__(self, llm: Any, attention: LocalizerConfig) -> None:
        """`llm`: whose localizer is of kind 'attention', with these settings."""
        from vllm_crop.frontend.attention_localizer import AttentionLocalizer
        from vllm_crop.frontend.engine_localizer import EngineLocalizer

        renderer = llm.llm_engine.renderer
        geometry = renderer.mm_processor.geometry
        self._attention = attention.model_copy(update={"warm_above": WARM_ABOVE})
        looking = AttentionLocalizer(renderer, geometry, self._attention)
        saying = EngineLocalizer(renderer, geometry, SPOKEN)
        self._look: Callable[[Picture, str], LocalizerAnswer] = looking.locate_now
        self._say: Callable[[Picture, str], LocalizerAnswer] = saying.locate_now

    def of(self, asked: Sequence[Asked]) -> Mapping[str, list[Found]]:
        """Per source and question. A question that somebody is not sure of has no region."""
        scenes = list({id(scene): scene for scene, _ in asked}.values())
        told = {source: self._told(source, scenes) for source in ("oracle", "random")}
        exact = [Found(told["oracle"][scene.scene.seed, question.text]) for scene, question in asked]
        looked = [self._located(self._look, self._attention, *one) for one in asked]
        return {
            "exact": exact,
            "shifted": [
                Found(
                    one.region
                    and shifted(one.region, scene.scene.side, f"{scene.scene.seed} {question.text}")
                )
                for one, (scene, question) in zip(exact, asked, strict=True)
            ],
            "attention": [replace(one, warm=None) for one in looked],
            "attention, warm": looked,
            "spoken": [self._located(self._say, SPOKEN, *one) for one in asked],
            "random": [Found(told["random"][scene.scene.seed, question.text]) for scene, question in asked],
        }

    @staticmethod
    def _told(source: str, scenes: Sequence[TestScene]) -> dict[tuple[int, str], Region | None]:
        rows = regions_for(source, scenes)
        return {
            (scene.scene.seed, question.text): region
            for scene, row in zip(scenes, rows, strict=True)
            for question, region in zip(scene.questions, row, strict=True)
        }

    @staticmethod
    def _located(
        locate: Callable[[Picture, str], LocalizerAnswer],
        config: LocalizerConfig,
        scene: TestScene,
        question: Question,
    ) -> Found:
        picture = scene.picture()
        try:
            answer = locate(Picture(lambda: picture), question.text)
            region, outcome = settle(answer, config)
        except UnreadableAnswerError:
            return Found()
        return Found(region, answer.warm if region else None, late=outcome == "low_confidence")


def shifted(region: Region, side: int, seed: str) -> Region:
    """Every box moved by a cell, in a direction that leaves all of it in the picture."""
    chance = random.Random(seed)
    moved = []
    for box in region.boxes:
        ways = [(1, 0), (-1, 0), (0, 1), (0, -1)]
        chance.shuffle(ways)
        for across, down in ways:
            sides = [
                box.x0 + across / side,
                box.y0 + down / side,
                box.x1 + across / side,
                box.y1 + down / side,
            ]
            if min(sides) > -1e-9 and max(sides) < 1 + 1e-9:
                moved.append(Box(*(min(1.0, max(0.0, one)) for one in sides)))
                break
    return Region(tuple(moved)) if moved else region
