# SPDX-License-Identifier: Apache-2.0
"""Runs the grid: cell by cell, with a progress bar, each finished cell kept."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rich.console import Console
from rich.progress import Progress

from lab.evaluation.asking import Answer, Answerer, SceneTask
from lab.evaluation.cells import LOCATE, OFF, GridCell
from lab.evaluation.questions import TestScene, make_test_set
from lab.evaluation.regions import parse_location, regions_for
from lab.evaluation.store import CellResult, Store
from vllm_crop.benchmarking.session import progress_bar
from vllm_crop.planning.budget import BudgetError
from vllm_crop.planning.geometry import Region
from vllm_crop.request import InvalidCropError

SCENES_AT_ONCE = 16
TIMED = 9  # requests for a time to first token, the first of them to warm up
TIMED_SEED = 7  # of a test set of its own: images that no cache has seen

AnswererFor = Callable[[GridCell], Answerer]
LocalizerAnswer = dict[tuple[int, str], Region]


@dataclass
class Session:
    """One run.

    Attributes:
        answerer_for: who answers a cell; asked only for unfinished cells, as starting one takes long.
        engine_for: the name of that one.
    """

    scenes: tuple[TestScene, ...]
    answerer_for: AnswererFor
    engine_for: Callable[[GridCell], str]
    store: Store
    console: Console
    revision: str | None = None
    _unpruned: tuple[Answer, ...] = ()

    def run(self, grid: Sequence[GridCell]) -> list[CellResult]:
        """Every cell, in order."""
        needs_locating = any(cell.region == "localizer" for cell in grid)
        cells = [GridCell(LOCATE), *grid] if needs_locating else list(grid)
        results: list[CellResult] = []
        located: LocalizerAnswer | None = None
        with progress_bar(self.console) as progress:
            overall = progress.add_task("cells", total=len(cells))
            for cell in cells:
                progress.update(overall, description=f"cells: {cell.slug}")
                results.append(self._result(cell, located, progress))
                if cell.method == LOCATE:
                    located = locations(self.scenes, results[-1].answers)
                elif cell == OFF:
                    self._unpruned = results[-1].answers
                progress.advance(overall)
        return results

    def _result(self, cell: GridCell, located: LocalizerAnswer | None, progress: Progress) -> CellResult:
        engine = self.engine_for(cell)
        known = self.store.load(cell, engine)
        if known is not None:
            return known
        answerer = self.answerer_for(cell)
        start = time.perf_counter()
        try:
            answers = list(chain.from_iterable(self._answers(answerer, cell, located, progress)))
            seconds = time.perf_counter() - start
            ttft = self._ttft(answerer, cell)
            result = CellResult(cell, engine, tuple(answers), seconds, ttft, None, self.revision)
        except (BudgetError, InvalidCropError) as error:
            result = CellResult(cell, engine, impossible=str(error), revision=self.revision)
        self.store.save(result)
        return result

    def _answers(
        self, answerer: Answerer, cell: GridCell, located: LocalizerAnswer | None, progress: Progress
    ) -> Iterator[list[Answer]]:
        every = make_tasks(cell, self.scenes, located)
        if not cell.sends_regions:
            yield from self._ask(answerer, cell, every, progress)
            return
        # Without a region a question is the unpruned model's own, which has answered it.
        known = iter(self._unpruned)
        pruned = chain.from_iterable(
            self._ask(answerer, cell, [task for task in map(only_regions, every) if task.regions], progress)
        )
        for task in every:
            old = [next(known) for _ in task.regions]
            yield [
                old[index] if region is None else next(pruned) for index, region in enumerate(task.regions)
            ]

    def _ask(
        self, answerer: Answerer, cell: GridCell, tasks: Sequence[SceneTask], progress: Progress
    ) -> Iterator[list[Answer]]:
        bar = progress.add_task(f"{cell.slug} ({answerer.name})", total=len(tasks))
        try:
            for first in range(0, len(tasks), SCENES_AT_ONCE):
                some = tasks[first : first + SCENES_AT_ONCE]
                yield from answerer.answer(cell, some)
                progress.advance(bar, len(some))
        finally:
            progress.remove_task(bar)

    def _ttft(self, answerer: Answerer, cell: GridCell) -> float | None:
        """Timed with true regions, if any are sent: the localizer's own time is that of its own cell."""
        scenes = make_test_set(TIMED, TIMED_SEED + hash_of(cell))[:TIMED]
        known = GridCell(cell.method, "oracle", cell.pruning_rate) if cell.sends_regions else cell
        return answerer.ttft_ms(cell, make_tasks(known, scenes, None))


def hash_of(cell: GridCell) -> int:
    """A seed for each cell, the same in every process."""
    return sum(index * byte for index, byte in enumerate(cell.slug.encode(), start=1))


def make_tasks(
    cell: GridCell, scenes: Sequence[TestScene], located: LocalizerAnswer | None
) -> list[SceneTask]:
    """The questions of all scenes with the regions of a cell."""
    if cell.region is None or not cell.sends_regions:
        return [SceneTask(scene, (None,) * len(scene.questions)) for scene in scenes]
    regions = regions_for(cell.region, scenes, located)
    return [SceneTask(scene, tuple(row)) for scene, row in zip(scenes, regions, strict=True)]


def only_regions(task: SceneTask) -> SceneTask:
    """The questions of a task that have a region."""
    chosen = [(q, region) for q, region in zip(task.scene.questions, task.regions, strict=True) if region]
    scene = TestScene(task.scene.scene, tuple(question for question, _ in chosen))
    return SceneTask(scene, tuple(region for _, region in chosen))


def locations(scenes: Sequence[TestScene], answers: Sequence[Answer]) -> LocalizerAnswer:
    """What the localizer said, by scene and question; nothing where it made no sense."""
    said = iter(answers)
    parsed = {(s.scene.seed, q.text): parse_location(next(said).text) for s in scenes for q in s.questions}
    return {key: region for key, region in parsed.items() if region is not None}
