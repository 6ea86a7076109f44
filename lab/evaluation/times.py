# SPDX-License-Identifier: Apache-2.0
"""Times to first token, apart from the answers: every served condition in turn, one request at a time.

What else a machine does meets all conditions of a round alike, and each is compared with the unpruned model
of its round. Regions are the true ones: the localizer's own request is timed as its own condition.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Protocol

from rich.console import Console

from lab.evaluation.asking import SceneTask
from lab.evaluation.conditions import OFF, Condition
from lab.evaluation.questions import PER_SCENE, make_test_set
from lab.evaluation.session import make_tasks
from lab.evaluation.store import ConditionResult, Store
from vllm_crop.benchmarking.report import write_json
from vllm_crop.benchmarking.session import progress_bar

ROUNDS = 9  # the first one warms up
TIMES_SEED = 7  # of a test set of its own: images that no cache has seen

Times = Mapping[Condition, Sequence[float]]  # milliseconds, by round


class Timed(Protocol):
    """An Answerer whose requests are timed one by one."""

    def first_token_ms(self, condition: Condition, task: SceneTask) -> float:
        """Of the first question of a scene; of the localizer to the last token, as nothing begins before."""
        ...


def measure_times(
    results: Sequence[ConditionResult],
    timed_by: Callable[[Condition], Timed],
    store: Store,
    console: Console,
) -> Times:
    """The times of all conditions that are served, measured unless they are known."""
    conditions = [one.condition for one in results if one.engine != "transformers" and not one.impossible]
    if OFF not in conditions:
        return {}
    path = store.folder / "times.json"
    known = _read(path, store, conditions)
    if known is not None:
        return known
    scenes = iter(make_test_set(PER_SCENE * ROUNDS * len(conditions), TIMES_SEED))
    times: dict[Condition, list[float]] = {condition: [] for condition in conditions}
    with progress_bar(console) as progress:
        for number in progress.track(range(ROUNDS), description="times to first token"):
            for condition in conditions:
                asked = (
                    Condition(condition.method, "oracle", condition.pruning_rate)
                    if condition.sends_regions
                    else condition
                )
                (task,) = make_tasks(asked, [next(scenes)], None)
                took = timed_by(condition).first_token_ms(asked, task)
                if number:
                    times[condition].append(took)
    measured = {condition.slug: values for condition, values in times.items()}
    write_json(path, {"settings": store.settings, "ms": measured})
    return times


def _read(path: Path, store: Store, conditions: Sequence[Condition]) -> Times | None:
    """What was measured in one run of the same settings; None if a condition is missing."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found["settings"] != store.settings or not {one.slug for one in conditions} <= {*found["ms"]}:
        return None
    return {condition: found["ms"][condition.slug] for condition in conditions}


def ttft(times: Times, condition: Condition) -> tuple[float, float] | None:
    """Median milliseconds, and the median share of the unpruned model's in the same round."""
    if condition not in times:
        return None
    ratios = [ours / theirs for ours, theirs in zip(times[condition], times[OFF], strict=True)]
    return median(times[condition]), median(ratios)
