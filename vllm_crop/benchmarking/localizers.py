# SPDX-License-Identifier: Apache-2.0
"""Localizers in a benchmark: what servers are told about them, and what became of the images."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_crop.benchmarking.options import Options
from vllm_crop.benchmarking.runs import Run
from vllm_crop.localizers.dialects import dialect_with
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.measuring.server import Server
from vllm_crop.planning.geometry import Region

# A token is a byte to the dummy, and it understands nothing: the dialect's words would only take time.
DUMMY_PROMPT = "where: {question}"
# All images cost the dummy the same; as much less as kind "engine" makes its glance.
DUMMY_GLANCE = {"regions": [Region.whole().as_lists()], "pruning_rate": 1 - 64 / 576, "method": "plc"}

_LOCALIZATIONS = re.compile(r'^crop:localizations_total\{.*outcome="(\w+)".*\} (\S+)$', re.MULTILINE)


def engine_localizer(options: Options) -> dict[str, Any]:
    """`localizer` of the server that asks itself."""
    return {"kind": "engine", **_dummy_settings(options), **options.localizer_config}


def remote_localizer(options: Options, server: Server) -> dict[str, Any]:
    """`localizer` of the server that asks another: the one the options name, or else the first `server`.

    That one is a vLLM, which can be held to legal answers.
    """
    if "base_url" in options.localizer_config:
        return {"kind": "openai", **options.localizer_config}
    config = {**_dummy_settings(options), **options.localizer_config}
    dialect = dialect_with(config.get("dialect", LocalizerConfig().dialect), config.get("prompt"))
    extra: dict[str, Any] = {"structured_outputs": {"regex": dialect.regex}}
    extra["crop"] = {"method": "off"} if options.model else DUMMY_GLANCE
    where = {"base_url": f"{server.base_url}/v1", "model": server.model}
    return {"kind": "openai", **where, "extra_body": extra, **config}


def _dummy_settings(options: Options) -> dict[str, Any]:
    """On a busy CPU a late answer is still one, to be timed."""
    return {} if options.model else {"prompt": DUMMY_PROMPT, "timeout_s": 60}


def outcomes(metrics: str) -> Counter[str]:
    """Images a server has localized since its start, by outcome, from its `/metrics`."""
    counts: Counter[str] = Counter()
    for outcome, value in _LOCALIZATIONS.findall(metrics):
        counts[outcome] += int(float(value))
    return counts


def outcomes_by_mode(runs: Sequence[Run]) -> Mapping[str, Counter[str]]:
    """Of all runs that localized."""
    modes: dict[str, Counter[str]] = {}
    for run in runs:
        if run.outcomes:
            modes.setdefault(run.spec.mode, Counter()).update(run.outcomes)
    return modes
