# SPDX-License-Identifier: Apache-2.0
"""One evaluation from options to report."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from lab.evaluation.answerers import Answerers
from lab.evaluation.comparisons import agreements
from lab.evaluation.options import Options
from lab.evaluation.questions import make_test_set
from lab.evaluation.report import Report, make_report
from lab.evaluation.session import Session
from lab.evaluation.store import ConditionResult, Store
from vllm_crop.measuring.provenance import provenance


def evaluate(options: Options, console: Console) -> Report:
    """Run what is not finished yet, and report all of it.

    Raises:
        CropError: checkpoint, engine or endpoint cannot be used; the message says what to do.
    """
    origin, settings = provenance(), options.settings()
    scenes = make_test_set(options.per_family, options.seed)
    store = Store(options.folder, settings)
    session = Session(scenes, Answerers(options), options.engine_for, store, console, origin["git_revision"])
    results = session.run(options.grid)
    origin = _origin(origin, options, settings, results)
    return make_report(scenes, results, agreements(results, store), origin)


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
        "conditions": [asdict(condition) for condition in options.grid],
        "revisions_of_conditions": revisions,
        "seconds": round(sum(result.seconds for result in results), 1),
    }
