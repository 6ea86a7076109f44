# SPDX-License-Identifier: Apache-2.0
"""Installed but not asked for: the same bytes as stock vLLM, for the same work.

Work is CPU time of all of a server's threads, which says the same while other tests keep the cores busy.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MODEL, STOCK_OPTIONS, serve
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT
from vllm_crop.benchmarking.api_cpu import cpu_ms
from vllm_crop.client import data_url
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

PAIRS = 12
MEDIAN_RANKS = (2, 9)  # of 12 sorted values; the median lies between them with 96 % (order statistics)
# An engine spins for a while before a request and after it: how long depends on what else is there to run.
PAUSE_S = 0.3


def cpu_s(server: Server) -> float:
    """CPU seconds of all processes of a server."""
    spent = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            if os.getpgid(int(process.name)) == server.process_id:
                spent += cpu_ms(int(process.name))
    return spent / 1e3


def ask(server: Server, seed: int) -> tuple[Any, float]:
    """One answer with its logprobs, and the CPU seconds it took."""
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(noise_image(seed))}},
        {"type": "text", "text": "What is it?"},
    ]
    start = cpu_s(server)
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=5,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    time.sleep(PAUSE_S)
    return (answer.usage, answer.choices[0]), cpu_s(server) - start


def test_outputs_and_work_equal_stock_vllm(
    stock_server: Server, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two servers side by side, asked in turn: one that does not load the plugin, one that does."""
    installed, without_plugin = stock_server, {"VLLM_PLUGINS": ""}
    log_path = logs / "without_plugin.log"
    with serve(str(CHECKPOINT), *STOCK_OPTIONS, log_path=log_path, env=without_plugin) as stock:
        for server in (stock, installed):
            ask(server, 0)
        ratios = []
        for pair in range(1, PAIRS + 1):
            order = (stock, installed) if pair % 2 else (installed, stock)
            results = {server.base_url: ask(server, pair) for server in order}
            (stock_answer, stock_s), (our_answer, our_s) = (
                results[server.base_url] for server in (stock, installed)
            )
            assert our_answer == stock_answer
            ratios.append(our_s / stock_s)
    ratios.sort()
    low, high = ratios[MEDIAN_RANKS[0]], ratios[MEDIAN_RANKS[1]]
    with capsys.disabled():
        print(
            f"\ninstalled / stock vLLM, CPU time of a request over {PAIRS} pairs: "
            f"median {median(ratios):.3f}, 96 % interval of the median {low:.3f} to {high:.3f}"
        )
    assert low <= 1.02
