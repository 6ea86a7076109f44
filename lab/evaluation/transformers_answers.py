# SPDX-License-Identifier: Apache-2.0
"""Answers by plain transformers: every rival, and CROP and the controls as a cross-check of the engine."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from lab.evaluation.asking import ANSWER_STEPS, Answer, Asked, SceneTask, ask
from lab.evaluation.conditions import CROP_METHODS, OFF, Condition
from lab.evaluation.crop_pruning import crop_pruning
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.runner.method import Pruning, Seen
from lab.evaluation.runner.qwen import UNPRUNED, QwenRunner, Reply
from lab.tinyvqa.drawing import draw_scene
from lab.tinyvqa.scenes import Scene
from vllm_crop.families.qwen_vl import SmartResize
from vllm_crop.planning.budget import Method
from vllm_crop.planning.plan import make_plan

_SCENES_KEPT = 1024  # 3 MB each


@dataclass(frozen=True)
class _Group:
    """Questions of a scene that run in one batch."""

    indices: tuple[int, ...]
    images: tuple[Seen, ...]
    texts: tuple[str, ...]
    pruning: Pruning
    steps: int


class TransformersAnswers:
    """An Answerer on the runner."""

    name = "transformers"

    def __init__(self, checkpoint: Path | str, eviction_layers: tuple[int, ...]) -> None:
        self.runner = QwenRunner(checkpoint)
        self.eviction_layers = eviction_layers
        self.resize = SmartResize.of_processor(self.runner.processor.image_processor)
        self.see = lru_cache(_SCENES_KEPT)(self._see_scene)

    def answer(self, condition: Condition, tasks: Sequence[SceneTask]) -> list[list[Answer]]:
        """Per scene and question."""
        return [self._answer_scene(condition, task) for task in tasks]

    def _answer_scene(self, condition: Condition, task: SceneTask) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for group in self._groups(condition, task):
            replies = self.runner.answer(group.images, group.texts, group.pruning, group.steps)
            answers |= dict(zip(group.indices, map(_answer, replies), strict=True))
        return [answers[index] for index in sorted(answers)]

    def _groups(self, condition: Condition, task: SceneTask) -> Iterator[_Group]:
        texts = [question.text for question in task.scene.questions]
        if condition.method in RIVALS:
            assert condition.pruning_rate is not None
            seen = self.see(task.scene.scene)
            tokens, layers = seen.grid.num_tokens, self.runner.num_layers
            pruning = RIVALS[condition.method](
                tokens, layers, condition.pruning_rate, condition.configuration
            )
            yield self._on_picture(range(len(texts)), texts, seen, pruning)
        elif condition.method == OFF.method:
            yield self._on_picture(range(len(texts)), texts, self.see(task.scene.scene), UNPRUNED)
        elif condition.method in CROP_METHODS:
            yield from self._crop_groups(condition, task, texts)
        else:
            yield from self._as_asked(ask(condition, task, self.resize))

    def _crop_groups(self, condition: Condition, task: SceneTask, texts: list[str]) -> Iterator[_Group]:
        assert condition.pruning_rate is not None
        seen = self.see(task.scene.scene)
        layers, method = self.runner.num_layers, cast(Method, condition.method)
        stages = () if condition.method == "plc" else self.eviction_layers
        plans = {
            index: make_plan(seen.grid, region, condition.pruning_rate, "pool", method, layers, stages)
            for index, region in enumerate(task.regions)
            if region is not None
        }
        if plans:
            yield self._on_picture(plans, texts, seen, crop_pruning(list(plans.values()), layers))
        if whole := [index for index in range(len(texts)) if index not in plans]:
            yield self._on_picture(whole, texts, seen, UNPRUNED)

    def _on_picture(self, indices: Iterable[int], texts: list[str], seen: Seen, pruning: Pruning) -> _Group:
        chosen = tuple(indices)
        return _Group(chosen, (seen,), tuple(texts[index] for index in chosen), pruning, ANSWER_STEPS)

    def _as_asked(self, asked: Sequence[Asked]) -> Iterator[_Group]:
        """Questions about the same images share what the vision tower makes of them."""
        together: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(asked):
            together.setdefault(tuple(id(image) for image in one.images), []).append(index)
        for indices in together.values():
            first = asked[indices[0]]
            images = tuple(self.runner.see(image, attention=False) for image in first.images)
            texts = tuple(asked[index].text for index in indices)
            yield _Group(tuple(indices), images, texts, UNPRUNED, first.steps)

    def _see_scene(self, scene: Scene) -> Seen:
        return self.runner.see(draw_scene(scene))


def _answer(reply: Reply) -> Answer:
    visual = sum(reply.tokens_per_layer) / len(reply.tokens_per_layer)
    text = reply.prompt_tokens - reply.tokens_per_layer[0]
    return Answer(reply.text, visual, visual + text, reply.prompt_tokens, steps=reply.steps)
