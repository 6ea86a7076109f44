# SPDX-License-Identifier: Apache-2.0
"""Installed but not asked for: the same bytes as stock vLLM, and no work of ours."""

import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MODEL, STOCK_OPTIONS, serve
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT
from vllm_crop.client import data_url
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

REQUESTS = 3
# vLLM's methods that are wrapped and lie on a request's way: they look whether the model prunes.
WRAPPERS = [
    "_noting.<locals>.preprocess_and_note",
    "patch.<locals>.process_inputs_with_crop",
]


def ask(server: Server, seed: int) -> Any:
    """One answer about a picture, with its logprobs."""
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(noise_image(seed))}},
        {"type": "text", "text": "What is it?"},
    ]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=5,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    return answer.usage, answer.choices[0]


def test_outputs_equal_stock_vllm_for_no_work_of_ours(logs: Path, tmp_path: Path) -> None:
    """Two servers asked the same: one does not load the plugin, one does, and notes each call of our code."""
    calls = tmp_path / "calls"
    traced = {"PYTHONPATH": str(Path(__file__).parent / "traced"), "CALLS_FILE": str(calls)}
    with (
        serve(
            str(CHECKPOINT),
            *STOCK_OPTIONS,
            log_path=logs / "without_plugin.log",
            env={"VLLM_PLUGINS": ""},
        ) as stock,
        serve(str(CHECKPOINT), *STOCK_OPTIONS, log_path=logs / "installed.log", env=traced) as installed,
    ):
        os.kill(installed.process_id, signal.SIGUSR2)
        ask(installed, REQUESTS)  # what is imported for the first request passes our finder
        at_start = calls.read_text()
        for seed in range(REQUESTS):
            assert ask(installed, seed) == ask(stock, seed)
        assert calls.read_text()[len(at_start) :].split() == WRAPPERS * REQUESTS
