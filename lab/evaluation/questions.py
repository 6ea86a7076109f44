# SPDX-License-Identifier: Apache-2.0
"""The test set: questions about scenes that training has never seen, the same number of every family."""

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from lab.tinyvqa.questions import FAMILIES, LOCAL, Question, ask
from lab.tinyvqa.scenes import Scene, is_test_seed, make_scene, test_seed

PER_SCENE = 2  # questions of a family about one scene: few, so that answers are nearly independent
Split = Literal["test", "dev", "seen"]
# Seeds of scenes that no two splits share. Choices are made on "dev"; nothing was ever chosen on "test".
SPLITS: dict[Split, int] = {"test": 20261201, "dev": 1, "seen": 0}
_TRIES = 20  # until a scene is taken to have no further question of a family


@dataclass(frozen=True)
class TestScene:
    """A scene with the questions asked about it."""

    __test__ = False  # not a class of tests

    scene: Scene
    questions: tuple[Question, ...]

    def picture(self) -> Image.Image:
        """The picture at full size."""
        from lab.tinyvqa.drawing import (
            draw_scene,
        )  # its numpy is slow to load, and names need no picture

        return draw_scene(self.scene)


def make_split(split: Split, per_family: int) -> tuple[TestScene, ...]:
    """The scenes of a split."""
    return make_test_set(per_family, SPLITS[split])


def only_local(scenes: tuple[TestScene, ...]) -> tuple[TestScene, ...]:
    """The questions of scenes that a region answers."""
    local = (
        TestScene(one.scene, tuple(asked for asked in one.questions if asked.family in LOCAL))
        for one in scenes
    )
    return tuple(one for one in local if one.questions)


def make_test_set(per_family: int, seed: int = 0) -> tuple[TestScene, ...]:
    """Scenes with exactly `per_family` questions of every family between them, no question twice."""
    left = dict.fromkeys(FAMILIES, per_family)
    scenes: list[TestScene] = []
    while any(left.values()):
        chosen = test_seed(seed, len(scenes))
        assert is_test_seed(chosen)
        asked = _ask(make_scene(chosen), left)
        for question in asked.questions:
            left[question.family] -= 1
        scenes.append(asked)
    return tuple(scene for scene in scenes if scene.questions)


def _ask(scene: Scene, left: dict[str, int]) -> TestScene:
    chance = random.Random(scene.seed)
    asked: dict[str, Question] = {}
    for family, wanted in left.items():
        found = 0
        for _ in range(_TRIES):
            if found == min(PER_SCENE, wanted):
                break
            question = ask(scene, family, chance)
            if question is not None and question.text not in asked:
                asked[question.text] = question
                found += 1
    return TestScene(scene, tuple(asked.values()))
