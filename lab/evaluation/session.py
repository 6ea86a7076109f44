# SPDX-License-Identifier: Apache-2.0
"""Runs the grid: condition by condition, with a progress bar, each finished condition kept."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rich.console import Console
from rich.progress import Progress

from lab.evaluation.asking import Answer, Answerer, SceneTask
from lab.evaluation.conditions import LOCATE, OFF, Condition
from lab.evaluation.questions import TestScene
from lab.evaluation.regions import parse_location, regions_for
from lab.evaluation.store import ConditionResult, Store
from vllm_crop.benchmarking.session import progress_bar
from vllm_crop.crop_params import InvalidCropError
from vllm_crop.planning.budget import BudgetError
from vllm_crop.planning.geometry import Region

SCENES_AT_ONCE = 16

AnswererFor = Callable[[Condition], Answerer]
LocatedRegions = dict[tuple[int, str], Region]


@dataclass
class Session:
    """One run.

    Attributes:
        answerer_for: who answers a condition; asked only for unfinished ones, as starting one takes long.
        engine_for: the name of that one.
    """

    scenes: tuple[TestScene, ...]
    answerer_for: AnswererFor
    engine_for: Callable[[Condition], str]
    store: Store
    console: Console
    revision: str | None = None
    _unpruned: tuple[Answer, ...] = ()

    def run(self, grid: Sequence[Condition]) -> list[ConditionResult]:
        """Every condition, in order."""
        needs_locating = any(condition.locates for condition in grid)
        conditions = [Condition(LOCATE), *grid] if needs_locating else list(grid)
        results: list[ConditionResult] = []
        located: LocatedRegions | None = None
        with progress_bar(self.console) as progress:
            overall = progress.add_task("cells", total=len(conditions))
            for condition in conditions:
                progress.update(overall, description=f"conditions: {condition.slug}")
                results.append(self._result(condition, located, progress))
                if condition.method == LOCATE:
                    located = locations(self.scenes, results[-1].answers)
                elif condition == OFF:
                    self._unpruned = results[-1].answers
                progress.advance(overall)
        return results

    def _result(
        self, condition: Condition, located: LocatedRegions | None, progress: Progress
    ) -> ConditionResult:
        engine = self.engine_for(condition)
        known = self.store.load(condition, engine)
        if known is not None:
            return known
        answerer = self.answerer_for(condition)
        start = time.perf_counter()
        try:
            answers = list(chain.from_iterable(self._answers(answerer, condition, located, progress)))
            seconds = time.perf_counter() - start
            result = ConditionResult(condition, engine, tuple(answers), seconds, None, self.revision)
        except (BudgetError, InvalidCropError) as error:
            result = ConditionResult(condition, engine, impossible=str(error), revision=self.revision)
        self.store.save(result)
        return result

    def _answers(
        self, answerer: Answerer, condition: Condition, located: LocatedRegions | None, progress: Progress
    ) -> Iterator[list[Answer]]:
        every = make_tasks(condition, self.scenes, located)
        if not condition.sends_regions:
            yield from self._ask(answerer, condition, every, progress)
            return
        # Without a region a question is the unpruned model's own, which has answered it.
        known = iter(self._unpruned)
        pruned = chain.from_iterable(
            self._ask(
                answerer, condition, [task for task in map(only_regions, every) if task.regions], progress
            )
        )
        for task in every:
            old = [next(known) for _ in task.regions]
            yield [
                old[index] if region is None else next(pruned) for index, region in enumerate(task.regions)
            ]

    def _ask(
        self, answerer: Answerer, condition: Condition, tasks: Sequence[SceneTask], progress: Progress
    ) -> Iterator[list[Answer]]:
        bar = progress.add_task(f"{condition.slug} ({answerer.name})", total=len(tasks))
        try:
            for first in range(0, len(tasks), SCENES_AT_ONCE):
                some = tasks[first : first + SCENES_AT_ONCE]
                yield from answerer.answer(condition, some)
                progress.advance(bar, len(some))
        finally:
            progress.remove_task(bar)


def make_tasks(
    condition: Condition, scenes: Sequence[TestScene], located: LocatedRegions | None
) -> list[SceneTask]:
    """The questions of all scenes with the regions of a condition."""
    if condition.region is None or not condition.sends_regions:
        return [SceneTask(scene, (None,) * len(scene.questions)) for scene in scenes]
    regions = regions_for(condition.region, scenes, located)
    return [SceneTask(scene, tuple(row)) for scene, row in zip(scenes, regions, strict=True)]


def only_regions(task: SceneTask) -> SceneTask:
    """The questions of a task that have a region."""
    chosen = [(q, region) for q, region in zip(task.scene.questions, task.regions, strict=True) if region]
    scene = TestScene(task.scene.scene, tuple(question for question, _ in chosen))
    return SceneTask(scene, tuple(region for _, region in chosen))


def locations(scenes: Sequence[TestScene], answers: Sequence[Answer]) -> LocatedRegions:
    """What the localizer said, by scene and question; nothing where it made no sense."""
    said = iter(answers)
    parsed = {(s.scene.seed, q.text): parse_location(next(said).text) for s in scenes for q in s.questions}
    return {key: region for key, region in parsed.items() if region is not None}
