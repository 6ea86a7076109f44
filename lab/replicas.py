# SPDX-License-Identifier: Apache-2.0
"""What it is worth that a router sends a session to one server: two servers behind vllm-router, both ways.

    python -m lab.replicas --sessions 11 --turns 6

The localizer's answers, the images it has been sent and their features are kept in each server's own
processes. Each session asks about a picture of its own, and every question twice, as a client that tries
again does; the sessions take turns in random order. For each policy servers start anew, with empty caches.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab.tinyvqa.drawing import draw_scene
from lab.tinyvqa.questions import ask
from lab.tinyvqa.scenes import make_scene, test_seed
from vllm_crop.client import CropClient
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.provenance import provenance
from vllm_crop.measuring.server import HOST, Server, free_port, get_text, serve, wait_until_ready

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tinyvqa"
POLICIES = ("round_robin", "consistent_hash")
_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", "512M", "--plugin", "crop", "--crop-config"),
    json.dumps({"pruning_rate": 0.889, "localizer": {"kind": "attention", "timeout_s": 60}}),
)
# vLLM would bind the threads of both to the same cores.
_UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# How much of what is asked a cache knows: hits, and of how many.
_CACHES = {
    "regions known": ("crop:localizer_cache_hits_total", "crop:localizations_total"),
    "images known": ("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"),
    "prompt tokens known": ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
}


@dataclass(frozen=True)
class Replicas:
    """Servers behind a router; `base_url` is the router's, without a path."""

    base_url: str
    servers: tuple[Server, ...]

    def stop(self, server: Server) -> None:
        """Let one of them end as a rolling restart does."""
        os.kill(server.process_id, signal.SIGTERM)

    def total(self, name: str) -> float:
        """A metric's sum over all servers."""
        return sum(metric_sum(get_text(f"{one.base_url}/metrics"), name) for one in self.servers)


@contextmanager
def router_in_front(servers: Sequence[Server], policy: str, log_path: Path) -> Iterator[Replicas]:
    """Run `vllm-router` before servers until the block ends.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm_router.launch_router", "--host", HOST, "--port", str(port)),
        *("--policy", policy, "--prometheus-port", str(free_port())),
        *("--worker-urls", *(server.base_url for server in servers)),
    ]
    with log_path.open("wb") as log:
        router = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(router, "vllm-router", f"http://{HOST}:{port}/health", log_path)
            yield Replicas(f"http://{HOST}:{port}", tuple(servers))
        finally:
            router.terminate()
            router.wait()


@dataclass(frozen=True)
class Outcome:
    """One policy's run.

    Attributes:
        known: per cache the share of what was asked that it knew.
        ttft_ms: of every request, in the order they were sent.
    """

    known: dict[str, float]
    ttft_ms: list[float]


def run_sessions(replicas: Replicas, sessions: int, turns: int, title: str, console: Console) -> Outcome:
    """Ask `2 * sessions * turns` questions, one after the other."""
    client = CropClient(f"{replicas.base_url}/v1")
    chance = random.Random(0)
    scenes = [make_scene(test_seed(7, session)) for session in range(sessions)]
    pictures = [draw_scene(scene) for scene in scenes]
    order = []
    for _ in range(turns):
        questions = [(session, ask(scene, "read", chance)) for session, scene in enumerate(scenes)]
        for _ in range(2):
            order += chance.sample(questions, len(questions))
    times = []
    for session, question in track(order, description=title, console=console, transient=True):
        assert question is not None  # every scene has something to read
        headers = {"extra_headers": {"X-Session-ID": f"session-{session}"}}
        times.append(client.ask(pictures[session], question.text, max_tokens=4, **headers).ttft_ms)
    known = {
        name: replicas.total(hits) / max(1.0, replicas.total(asked))
        for name, (hits, asked) in _CACHES.items()
    }
    return Outcome(known, times)


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Clients, each with a picture of its own.")] = 11,
    turns: Annotated[int, typer.Option(min=1, help="Questions of each, all of them asked twice.")] = 6,
) -> None:
    """Compare round robin with consistent hashing before two servers of the repository's model."""
    console = Console(highlight=False)
    table = Table("policy", *_CACHES, "time to first token (quartiles)", box=None)
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            with ExitStack() as running:
                servers = [
                    running.enter_context(
                        serve(
                            *(str(CHECKPOINT), *_OPTIONS),
                            log_path=Path(folder) / f"{policy}{number}.log",
                            env=_UNBOUND,
                        )
                    )
                    for number in range(2)
                ]
                log_path = Path(folder) / f"{policy}.log"
                replicas = running.enter_context(router_in_front(servers, policy, log_path))
                outcome = run_sessions(replicas, sessions, turns, policy, console)
            low, middle, high = quantiles(outcome.ttft_ms, n=4)
            shares = [f"{100 * share:.0f} %" for share in outcome.known.values()]
            table.add_row(policy, *shares, f"{middle:.0f} ms ({low:.0f}-{high:.0f})")
    console.print(table)
    made_by = provenance()
    console.print(f"{sessions} sessions, {turns} questions each, asked twice")
    console.print_json(json.dumps(made_by))


if __name__ == "__main__":
    typer.run(main)
