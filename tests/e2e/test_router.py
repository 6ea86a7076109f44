# SPDX-License-Identifier: Apache-2.0
"""Two servers behind vLLM's own router: every answer says what became of its images, whoever gave it."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from lab.replicas import Replicas, router_in_front
from tests.e2e.conftest import MODEL, metric, serve
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT
from vllm_crop.client import facts_of, question_about
from vllm_crop.commands.app import app
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

SIDE, FULL, RATE = 256, 256, 0.75  # pixels; visual tokens of a picture
OPTIONS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--shutdown-timeout", "30", "--plugin", "crop", "--crop-config"),
    json.dumps({"pruning_rate": RATE, "localizer": {"kind": "attention", "timeout_s": 60}}),
)
HERE = [0.1, 0.1, 0.3, 0.3]
REQUESTS, AT_ONCE, STOPPED_AT, LATER = 200, 8, 100, 24


@pytest.fixture(scope="module")
def replicas(logs: Path) -> Iterator[Replicas]:
    with ExitStack() as all_of_it:
        servers = [
            all_of_it.enter_context(
                serve(
                    *(str(CHECKPOINT), *OPTIONS),
                    log_path=logs / f"replica{number}.log",
                    env={"VLLM_PLUGINS": "crop"} if number else {},
                )
            )
            for number in range(2)
        ]
        yield all_of_it.enter_context(router_in_front(servers, "round_robin", logs / "router.log"))


def one_of_many(client: openai.OpenAI, seed: int) -> str:
    """Ask one question of some kind; what was wrong about its answer, "" for nothing."""
    draw = random.Random(seed)
    kind = draw.choice(["region", "found", "off", "bound", "streamed", "wrong", "two"])
    pictures = [noise_image(seed * 2 + number, SIDE, SIDE) for number in range(1 + (kind == "two"))]
    pruned = FULL - round(FULL * RATE)
    crop: Any = {
        "region": {"regions": [HERE]},
        "found": None,
        "off": {"method": "off", "regions": [HERE]},
        "bound": {"max_tokens": 30, "regions": [HERE]},
        "streamed": {"regions": [HERE]},
        "wrong": {"regions": [[1, 1, 0, 2]]},
        "two": {"regions": [HERE, None]},
    }[kind]
    options: dict[str, Any] = {"stream": True} if kind == "streamed" else {}
    try:
        answer = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=question_about(pictures, "what is it?"),
            max_tokens=3,
            extra_body={} if crop is None else {"crop": crop},
            **options,
        )
    except openai.BadRequestError as error:
        return "" if kind == "wrong" and "crop.regions" in str(error) else f"{kind}: {error}"
    except openai.OpenAIError as error:
        return f"lost: {error}"
    facts = facts_of(answer.headers)
    if kind == "streamed":
        try:
            list(answer.parse())
        except openai.OpenAIError as error:
            return f"lost: {error}"
    if facts is None or kind == "wrong":
        return f"{kind}: {facts}"
    counts = [image["tokens_after_plc"] for image in facts["images"]]
    expected = {"off": [FULL], "bound": [30], "two": [pruned, FULL]}.get(kind, [pruned])
    if kind == "found":  # in noise it may find nothing
        (image,) = facts["images"]
        expected = [pruned] if image["region"] else [FULL]
        if image["source"] != "attention" or image["localizer"]["outcome"] not in (
            "region",
            "low_confidence",
        ):
            return f"found: {image}"
    return "" if counts == expected else f"{kind}: {counts} and not {expected}"


def wait_until_closed(server: Server) -> None:
    """Until nobody listens at its address."""
    host, _, port = server.base_url.removeprefix("http://").partition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError("the server does not go")


def test_an_endpoint_behind_a_router_says_what_works(replicas: Replicas) -> None:
    result = CliRunner().invoke(
        app, ["check", "--base-url", f"{replicas.base_url}/v1"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    said = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert Counter(state for state, _ in said)["fails"] == 0
    assert (
        sum("4 of 4 requests with a region" in rest or "on 5 of 5 answers" in rest for _, rest in said) == 2
    )


def test_mixed_requests_while_a_server_is_stopped(replicas: Replicas) -> None:
    """What is in flight at the one that goes, or comes while it is going, may be lost; nothing else.

    vLLM takes requests for a moment in which it can no longer process their pictures.
    """
    client = openai.OpenAI(base_url=f"{replicas.base_url}/v1", api_key="unused", max_retries=0, timeout=60)
    gone = threading.Event()
    first, second = replicas.servers

    def ask(seed: int) -> str:
        if seed == STOPPED_AT:
            second_served.append(metric(second, "crop:requests_total"))
            replicas.stop(second)
            wait_until_closed(second)
            gone.set()
            return ""
        before = gone.is_set()
        problem = one_of_many(client, seed)
        return f"after it had gone, {problem}" if before and problem else problem

    second_served: list[float] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        problems = [problem for problem in pool.map(ask, range(REQUESTS + 1)) if problem]
        later = [problem for problem in pool.map(ask, range(REQUESTS + 1, REQUESTS + 1 + LATER)) if problem]
    assert later == []
    lost = [problem for problem in problems if problem.startswith("lost: ")]
    assert problems == lost
    assert len(lost) < 2 * AT_ONCE
    assert second_served[0] > STOPPED_AT / 4, "both have served"
    assert metric(first, "crop:requests_total") > REQUESTS / 2
