# SPDX-License-Identifier: Apache-2.0
"""What older images of a conversation cost: an agent with a screenshot a turn, stock and with `history`.

Servers side by side get the same conversation, turn by turn, in turn. All keep what they have computed
(prefix caching): stock vLLM computes only what is new; with `history` it is that, and now and then a few
screenshots that have grown old.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.benchmarking import dummy_qwen2_5_vl
from vllm_crop.benchmarking.kv import KVCapacity, KVSampler
from vllm_crop.client import CropClient, image_part
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.server import Server, get_text, serve

TURNS, SCREEN = 20, (560, 448)  # 320 visual tokens of 28 pixels
ANSWER_TOKENS = 16
KEEP, OLD_TOKENS = 2, 32
HISTORIES: Mapping[str, Mapping[str, int] | None] = {
    "stock": None,
    "history, stride 1": {"keep": KEEP, "max_tokens": OLD_TOKENS, "stride": 1},
    "history, stride 4": {"keep": KEEP, "max_tokens": OLD_TOKENS, "stride": 4},
    "history, not seen": {"keep": KEEP, "max_tokens": 0, "stride": 4},
}
SERVED = (
    *("--served-model-name", "m", "--dtype", "float32", "--load-format", "dummy", "--enforce-eager"),
    *("--max-model-len", "16384", "--max-num-batched-tokens", "8192", "--block-size", "32"),
    *("--kv-cache-memory-bytes", str(1 << 30), "--skip-mm-profiling", "--max-num-seqs", "2"),
    *("--limit-mm-per-prompt", json.dumps({"image": TURNS})),
)


@dataclass(frozen=True)
class Conversation:
    """One conversation with one server.

    Attributes:
        ttft_ms: per turn, to the first token.
        prompt_tokens: per turn.
        peak_kv_tokens: the most that the conversation held in any sample.
        hit_rate: of the prompts' tokens, from the second turn on, those found in the prefix cache.
    """

    server: str
    ttft_ms: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    peak_kv_tokens: float
    hit_rate: float


def measure_conversations(repeats: int = 3, turns: int = TURNS) -> Iterator[list[Conversation]]:
    """Hold a conversation with each server, `repeats` times, each about other screenshots.

    Raises:
        ServerError: a server did not start.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        model = str(dummy_qwen2_5_vl.make_checkpoint(folder / "model", dummy_qwen2_5_vl.BENCH))
        running = {}
        for index, (called, history) in enumerate(HISTORIES.items()):
            crop = (
                ()
                if history is None
                else ("--plugin", "crop", "--crop-config", json.dumps({"history": history}))
            )
            env = {"VLLM_PLUGINS": ""} if history is None else {}
            log = folder / f"{index}.log"
            running[called] = servers.enter_context(serve(model, *SERVED, *crop, log_path=log, env=env))
        for server in running.values():
            _hold({"": server}, 2, Random(-1))
        for repeat in range(repeats):
            yield _hold(running, turns, Random(repeat))


def conversation_table(measured: Sequence[Sequence[Conversation]]) -> Table:
    """A row per server, medians over conversations."""
    width, height = SCREEN
    turns = len(measured[0][0].ttft_ms)
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1),
        title=f"{turns} turns, a screenshot of {width}x{height} in each",
        caption=f"Medians of {len(measured)} conversations (least to most); KV in tokens of all layers.",
    )
    table.add_column("server")
    for heading in ("prompt, last turn", "KV peak", "found in cache", "TTFT, last turn", "TTFT, all turns"):
        table.add_column(heading, justify="right")
    for index, first in enumerate(measured[0]):
        held = [one[index] for one in measured]
        table.add_row(
            first.server,
            str(first.prompt_tokens[-1]),
            f"{median(one.peak_kv_tokens for one in held):.0f}",
            f"{median(one.hit_rate for one in held):.0%}",
            _spread([one.ttft_ms[-1] for one in held], "ms"),
            _spread([sum(one.ttft_ms) / 1000 for one in held], "s"),
        )
    return table


def _spread(values: Sequence[float], unit: str) -> str:
    digits = 0 if unit == "ms" else 1
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} {unit} ({low}-{high})"


def _hold(running: Mapping[str, Server], turns: int, random: Random) -> list[Conversation]:
    clients = {called: CropClient(f"{server.base_url}/v1", "m") for called, server in running.items()}
    capacities = {called: KVCapacity.of_server(server.base_url) for called, server in running.items()}
    before = {called: _prefix_counts(server) for called, server in running.items()}
    ttft: dict[str, list[float]] = {called: [] for called in running}
    lengths: dict[str, list[int]] = {called: [] for called in running}
    peaks = dict.fromkeys(running, 0.0)
    messages: list[Any] = []
    for turn in range(turns):
        screenshot = Image.frombytes("RGB", SCREEN, random.randbytes(3 * SCREEN[0] * SCREEN[1]))
        text = {"type": "text", "text": f"What is to be done in step {turn}?"}
        messages.append({"role": "user", "content": [image_part(screenshot), text]})
        order = list(running)
        for called in order[turn % len(order) :] + order[: turn % len(order)]:
            with KVSampler(running[called].base_url, capacities[called]) as sampler:
                answer = clients[called].ask_messages(
                    messages, max_tokens=ANSWER_TOKENS, extra_body={"ignore_eos": True}
                )
            peaks[called] = max(peaks[called], sampler.usage().peak_tokens)
            ttft[called].append(answer.ttft_ms)
            lengths[called].append(answer.prompt_tokens)
        messages.append({"role": "assistant", "content": "Click on it."})
    held = []
    for called, server in running.items():
        hits, queries = (now - then for now, then in zip(_prefix_counts(server), before[called], strict=True))
        later = queries - lengths[called][0]
        held.append(
            Conversation(
                called,
                tuple(ttft[called]),
                tuple(lengths[called]),
                peaks[called],
                hits / later if later else 0.0,
            )
        )
    return held


def _prefix_counts(server: Server) -> tuple[float, float]:
    """Tokens found in the prefix cache, and sought."""
    text = get_text(f"{server.base_url}/metrics")
    return metric_sum(text, "vllm:prefix_cache_hits_total"), metric_sum(
        text, "vllm:prefix_cache_queries_total"
    )
