# SPDX-License-Identifier: Apache-2.0
"""One evaluation from options to report."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from lab.evaluation.answerers import Answerers
from lab.evaluation.comparisons import agreements
from lab.evaluation.notes import notes_of
from lab.evaluation.options import CheckpointError, Options
from lab.evaluation.prefill_work import PrefillWork
from lab.evaluation.published_answers import NAME as ANSWERS
from lab.evaluation.published_answers import write_answers
from lab.evaluation.questions import make_split
from lab.evaluation.report import Report, make_report
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.session import Session
from lab.evaluation.store import ConditionResult, Store
from lab.evaluation.times import measure_times
from vllm_crop.benchmarking.prefill import read_shape
from vllm_crop.measuring.provenance import provenance


def evaluate(options: Options, console: Console) -> Report:
    """Run what is not finished yet, and report all of it.

    Raises:
        CropError: checkpoint, engine or endpoint cannot be used; the message says what to do.
    """
    origin, settings = provenance(), options.settings()
    _check_tuning(options, settings)
    scenes = make_split(options.split, options.per_family)
    store = Store(options.folder, settings)
    answerers = Answerers(options)
    session = Session(scenes, answerers, options.engine_for, store, console, origin["git_revision"])
    results = session.run(options.grid)
    times = measure_times(results, answerers.timed, store, console) if options.times else {}
    origin = _origin(origin, options, settings, results)
    write_answers(options.folder / ANSWERS, scenes, results)
    notes = notes_of(options.split, options.tuning)
    work = PrefillWork(read_shape(str(options.model)), options.eviction_layers)
    return make_report(scenes, results, agreements(results, store), origin, notes, times, work)


def _check_tuning(options: Options, settings: dict[str, Any]) -> None:
    """Configurations that were best for another checkpoint, or that are no more, say nothing."""
    rivals = [condition for condition in options.grid if condition.chooses_tokens]
    if not rivals or options.tuning is None:
        return
    gone = [one for one in rivals if one.configuration not in (None, *RIVALS[one.method].configurations)]
    if gone:
        raise CheckpointError(
            f"the tuning chose {gone[0].configuration!r} for {gone[0].method}, which has none of that name "
            "any more: tune again with python -m lab.evaluation.tuning"
        )
    if options.tuning.provenance["settings"]["weights"] != settings["weights"]:
        raise CheckpointError(
            f"rivals were tuned for another checkpoint than {options.model}: tune them for this one with "
            "python -m lab.evaluation.tuning --model and --out, and give the file with --tuning"
        )


def _tuning(options: Options) -> dict[str, Any] | None:
    """What the tuning was, and how many configurations it asked of each rival at each rate."""
    if options.tuning is None:
        return None
    rivals = [condition for condition in options.grid if condition.chooses_tokens]
    tried = {
        f"{one.method} {one.pruning_rate:g}": options.tuning.number_tried(one.method, one.pruning_rate)
        for one in rivals
        if one.pruning_rate is not None
    }
    of = options.tuning.provenance
    return {key: of[key] for key in ("date", "git_revision", "settings", "asked")} | {"tried": tried}


def _origin(
    origin: dict[str, Any], options: Options, settings: dict[str, Any], results: Sequence[ConditionResult]
) -> dict[str, Any]:
    """Where the numbers come from; conditions of earlier runs may be of earlier revisions."""
    revisions = sorted({result.revision or "unknown" for result in results})
    return {
        **origin,
        "model": str(options.model),
        "settings": settings,
        "engine": options.engine_for(options.grid[0]),
        "crop_settings": options.crop_settings(),
        "tuning": _tuning(options),
        "conditions": [asdict(condition) for condition in options.grid],
        "revisions_of_conditions": revisions,
        "seconds": round(sum(result.seconds for result in results), 1),
    }
