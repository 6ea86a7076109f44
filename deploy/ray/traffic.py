# SPDX-License-Identifier: Apache-2.0
"""A replica killed in the middle of traffic: who loses an answer, and how long until all is as before."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import httpx
import openai
import psutil
from local_cluster import Cluster
from mixed_requests import AT_ONCE, MODEL_NAME, questions

from lab.findings import Findings, seconds
from vllm_crop.client import CropClient

TOKENS = 24  # long enough for several requests to be in flight at any time
BEFORE_S, AFTER_S, RECOVERY_S = 5.0, 5.0, 300.0


@dataclass(frozen=True)
class Sent:
    """A request of the traffic: when it was sent and ended, and why it was lost, "" if it was answered."""

    begin: float
    end: float
    lost: str


def kill_one(cluster: Cluster, base_url: str, findings: Findings) -> None:
    """End a replica's process under traffic; what is in flight at it may be lost, and nothing else."""
    sent: list[Sent] = []
    done = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        senders = [pool.submit(_send_until, done, base_url, seed, sent.append) for seed in range(AT_ONCE)]
        try:
            before = cluster.replicas()
            victim = _busiest(before, BEFORE_S)
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            recovered = _wait_until_replaced(cluster, victim, len(before), killed)
            time.sleep(AFTER_S)
        finally:
            done.set()
        for sender in senders:
            sender.result()
    note_losses(sent, killed, findings)
    findings.note("two replicas again after", seconds(recovered), recovered < RECOVERY_S)
    during = sum(killed < one.begin and one.end < killed + recovered and not one.lost for one in sent)
    findings.note("answered by then", during, during > 0)
    ends = sorted([killed, *(one.end for one in sent if one.end > killed and not one.lost)])
    pause = max((end - begin for begin, end in pairwise(ends)), default=0.0)
    findings.note("longest time without an answer", seconds(pause))


def note_losses(sent: list[Sent], killed: float, findings: Findings) -> None:
    """Only requests that were in flight may be lost, and not all of them: some were at the other replica."""
    in_flight = [one for one in sent if one.begin < killed < one.end]
    others = [one for one in sent if one not in in_flight]
    lost = [one.lost for one in in_flight if one.lost]
    findings.note("in flight when a replica is killed", len(in_flight))
    findings.note("lost of these", f"{len(lost)} {sorted(set(lost)) or ''}", len(lost) < len(in_flight))
    stray = [one.lost for one in others if one.lost]
    found = f"{len(stray)} of {len(others)} {sorted(set(stray)) or ''}"
    findings.note("lost of those before and after it", found, not stray)


def _send_until(done: threading.Event, base_url: str, seed: int, note: Callable[[Sent], None]) -> None:
    chance, client = random.Random(seed), CropClient(base_url, MODEL_NAME, timeout=120.0)
    while not done.is_set():
        asked, begin, lost = chance.choice(questions()), time.monotonic(), ""
        try:
            answer = client.ask(asked.picture, asked.text, max_tokens=TOKENS, extra_body={"ignore_eos": True})
            # A stream that is cut may look like one that has ended.
            if answer.completion_tokens != TOKENS:
                lost = f"{answer.completion_tokens} of {TOKENS} tokens"
        except (openai.OpenAIError, httpx.TransportError) as error:
            lost = f"{type(error).__name__}: {error}"
        note(Sent(begin, time.monotonic(), lost))


def _busiest(replicas: set[int], duration_s: float) -> int:
    """The one that computes most in so many seconds from now: it has requests in flight."""

    def spent(process_id: int) -> float:
        replica = psutil.Process(process_id)
        times = [one.cpu_times() for one in (replica, *replica.children(recursive=True))]
        return float(sum(one.user + one.system for one in times))

    begin = {one: spent(one) for one in replicas}
    time.sleep(duration_s)
    return max(replicas, key=lambda one: spent(one) - begin[one])


def _wait_until_replaced(cluster: Cluster, victim: int, replicas: int, killed: float) -> float:
    """Seconds until as many replicas answer as before, without the one that was killed."""
    while (elapsed := time.monotonic() - killed) < RECOVERY_S:
        alive = cluster.replicas()
        if victim not in alive and len(alive) == replicas:
            break
        time.sleep(0.5)
    return elapsed
