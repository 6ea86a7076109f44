# SPDX-License-Identifier: Apache-2.0
"""Runs the unchanged lmms-eval in a process of its own, and reads the samples it has logged."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lab.demo.setting import SERVER_ENVIRONMENT
from lab.lmms_eval.task import NAME
from vllm_crop.errors import CropError
from vllm_crop.measuring.server import log_tail

BATCH_SIZE = 32


class RunError(CropError):
    """lmms-eval has logged no answers; the message ends with the tail of what it said."""


@dataclass(frozen=True)
class Answers:
    """What lmms-eval has logged of one run.

    Attributes:
        texts: in the order of the task's documents.
        score: its own, the mean of the metric "exact".
        prompt_tokens: of a question, on average; None where its model counts none.
    """

    texts: tuple[str, ...]
    score: float
    prompt_tokens: float | None


def run_lmms_eval(model: str, model_args: Mapping[str, Any], task: Path, out: Path) -> Answers:
    """Ask a task's questions.

    Args:
        model: as lmms-eval calls it, `--model`.
        model_args: values that are mappings are passed as JSON.
        task: the folder of the task.
        out: a folder without results, for its results and its log.

    Raises:
        RunError: it has failed. lmms-eval ends with 0 all the same.
    """
    arguments = ",".join(
        f"{key}={json.dumps(value) if isinstance(value, Mapping) else value}"
        for key, value in model_args.items()
    )
    command = (
        *(sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments),
        *("--include_path", str(task), "--tasks", NAME, "--batch_size", str(BATCH_SIZE)),
        *("--log_samples", "--output_path", str(out)),
    )
    # What the library for data sets makes of the questions stays in the folder, too.
    environment = {**SERVER_ENVIRONMENT, "HF_DATASETS_CACHE": str(out / "datasets")}
    out.mkdir(parents=True)
    log = out / "log"
    with log.open("wb") as output:
        subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}, check=False
        )
    samples, results = list(out.rglob(f"*_samples_{NAME}.jsonl")), list(out.rglob("*_results.json"))
    if not samples or not results:
        raise RunError(f"lmms-eval has logged no answers. The end of {log}:\n{log_tail(log)}")
    return _read(samples[0], results[0])


def _read(samples: Path, results: Path) -> Answers:
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: int(line["doc_id"]))
    counts = [tokens["input_tokens"] for line in lines for tokens in line["token_counts"] if tokens]
    return Answers(
        tuple(line["filtered_resps"].strip() for line in lines),
        json.loads(results.read_text(encoding="utf-8"))["results"][NAME]["exact,none"],
        mean(counts) if counts else None,
    )
