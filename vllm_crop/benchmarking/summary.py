# SPDX-License-Identifier: Apache-2.0
"""From single runs to medians and ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import get_args

from vllm_crop.benchmarking.runs import Mode, Run

FIELDS = (
    "requests_per_s",
    "output_tokens_per_s",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "kv_peak_tokens",
)


@dataclass(frozen=True)
class Ratio:
    """A ratio over the repeats of one concurrency: median, smallest and largest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """All runs at one concurrency.

    Attributes:
        reference: the mode compared with: stock vLLM where that was measured.
        medians: per mode, per field of Run.
        ratios: per other mode, per field of Run; None where nothing was measured to divide by.
    """

    concurrency: int
    reference: Mode
    medians: dict[Mode, dict[str, float]]
    ratios: dict[Mode, dict[str, Ratio | None]]


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """One summary per concurrency, in the order of the runs."""
    return [
        _summarize([run for run in runs if run.spec.concurrency == concurrency])
        for concurrency in dict.fromkeys(run.spec.concurrency for run in runs)
    ]


def mean_prompt_tokens(runs: Sequence[Run]) -> dict[Mode, float]:
    """Prompt tokens per request by mode, over all requests."""
    tokens = {}
    for mode in dict.fromkeys(run.spec.mode for run in runs):
        chosen = [run for run in runs if run.spec.mode == mode]
        total = sum(run.prompt_tokens * run.requests for run in chosen)
        tokens[mode] = total / sum(run.requests for run in chosen)
    return tokens


def _summarize(runs: Sequence[Run]) -> Summary:
    by_mode: dict[Mode, dict[int, Run]] = {}
    for run in runs:
        by_mode.setdefault(run.spec.mode, {})[run.spec.repeat] = run
    reference, *others = [mode for mode in get_args(Mode) if mode in by_mode]
    medians = {
        mode: {field: median(getattr(run, field) for run in by_mode[mode].values()) for field in FIELDS}
        for mode in (reference, *others)
    }
    ratios = {
        mode: {field: _ratio(field, by_mode[mode], by_mode[reference]) for field in FIELDS} for mode in others
    }
    return Summary(runs[0].spec.concurrency, reference, medians, ratios)


def _ratio(field: str, upper: Mapping[int, Run], lower: Mapping[int, Run]) -> Ratio | None:
    pairs = [
        (getattr(upper[repeat], field), getattr(lower[repeat], field)) for repeat in upper if repeat in lower
    ]
    if not pairs or any(divisor == 0 for _, divisor in pairs):
        return None
    values = [value / divisor for value, divisor in pairs]
    return Ratio(median(values), min(values), max(values))
