# SPDX-License-Identifier: Apache-2.0
"""A server that checks every pruned request against the unpruned model, beside one that checks none."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from lab.evaluation.questions import make_test_set
from tests.e2e.conftest import API_KEY, MODEL, metric
from tests.tinyvqa import ask
from vllm_crop.client import question_about
from vllm_crop.crop_params import FACTS_HEADER
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.server import Server, get_text

pytestmark = pytest.mark.e2e

SCENES = make_test_set(4, seed=57)
LOCAL = [(scene, q) for scene in SCENES for q in scene.questions if q.boxes]
BESIDE = [[0.0, 0.0, 0.125, 0.125]]
CHECKS, FIRST = "crop:shadow_checks_total", "crop:shadow_first_tokens_total"
LOST = "crop:shadow_logprob_lost_nats"


@pytest.fixture
def client(checked_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{checked_server.base_url}/v1", api_key="unused", max_retries=0)


def right(question: Any) -> Any:
    return [question.region(8).as_lists()]


def marked(picture: Image.Image, number: int) -> Image.Image:
    """A picture that no cache has seen."""
    picture.putpixel((0, 0), (number % 256, number // 256, 57))
    return picture


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


class Watched:
    """The checks' metrics since now."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.wait_until_idle()
        self.before = self._read()

    def _keys(self) -> list[tuple[str, str, str]]:
        outcomes = [
            (CHECKS, "outcome", one) for one in ("compared", "dropped", "timeout", "too_long", "failed")
        ]
        agreement = [(FIRST, "agreement", one) for one in ("same", "different")]
        return [*outcomes, *agreement, (f"{LOST}_sum", "", ""), (f"{LOST}_count", "", "")]

    def _read(self) -> dict[tuple[str, str, str], float]:
        """All from one page: to show it is work for the server."""
        page = get_text(f"{self.server.base_url}/metrics")
        return {
            (name, label, value): metric_sum(page, name, **({label: value} if label else {}))
            for name, label, value in self._keys()
        }

    def now(self) -> dict[str, float]:
        """Differences, by the label's value or the name's end."""
        return {
            key[2] or key[0].removeprefix(f"{LOST}_"): value - self.before[key]
            for key, value in self._read().items()
        }

    def wait_until_idle(self) -> None:
        wait_until(lambda: metric(self.server, "vllm:num_requests_running") == 0)
        wait_until(lambda: metric(self.server, "vllm:num_requests_waiting") == 0)

    def wait_for(self, checks: int) -> dict[str, float]:
        wait_until(lambda: sum(self.now()[one] for one in ("compared", "dropped", "failed")) >= checks)
        return self.now()


def without_names(response: Any) -> Any:
    """A response apart from its id and its time."""
    body = response.http_response.json()
    # The fingerprint is of the server's settings.
    return {key: value for key, value in body.items() if key not in ("id", "created", "system_fingerprint")}


def test_answers_and_headers_are_those_of_a_server_that_checks_nothing(
    checked_server: Server, client: openai.OpenAI, localizing_server: Server
) -> None:
    plain = openai.OpenAI(base_url=f"{localizing_server.base_url}/v1", api_key=API_KEY, max_retries=0)
    watched = Watched(checked_server)
    asked = 0
    for scene, question in LOCAL[:4]:
        for regions in (right(question), [BESIDE]):
            for method in ("plc", "ilp", "plc+ilp"):
                crop = {"regions": regions, "method": method}
                options: Any = {"logprobs": True, "top_logprobs": 3} if method == "plc" else {}
                with_checks, without = (
                    ask(one, scene.picture(), question.text, crop, **options) for one in (client, plain)
                )
                asked += 1
                assert with_checks.headers[FACTS_HEADER] == without.headers[FACTS_HEADER]
                assert set(with_checks.headers) == set(without.headers)
                got, wanted = without_names(with_checks), without_names(without)
                if options:
                    for body in (got, wanted):
                        tokens = body["choices"][0].pop("logprobs")["content"]
                        body["tokens"] = [
                            (t["token"], [top["token"] for top in t["top_logprobs"]]) for t in tokens
                        ]
                assert got == wanted
        watched.wait_for(asked)
    assert watched.now()["failed"] == 0


def test_agreement_is_what_a_client_would_measure(checked_server: Server, client: openai.OpenAI) -> None:
    def likeliest(scene: Any, question: Any, crop: Any) -> dict[str, float]:
        response = ask(
            client, scene.picture(), question.text, crop, max_tokens=1, logprobs=True, top_logprobs=20
        )
        first = response.parse().choices[0].logprobs.content[0]
        return {top.token: top.logprob for top in first.top_logprobs}

    measured: dict[str, dict[str, float]] = {}
    for name, regions in (("right", None), ("beside", [BESIDE])):
        watched = Watched(checked_server)
        lost, different = 0.0, 0
        for number, (scene, question) in enumerate(LOCAL, 1):
            crop = {"regions": regions or right(question), "rim": 0}
            pruned = likeliest(scene, question, crop)
            watched.wait_for(number)  # one after the other: none is dropped
            unpruned = likeliest(scene, question, {"method": "off"})
            token = max(unpruned, key=lambda one: unpruned[one])
            different += token != max(pruned, key=lambda one: pruned[one])
            lost += max(0.0, unpruned[token] - pruned.get(token, min(pruned.values())))
        found = measured[name] = watched.now()
        assert (found["compared"], found["count"]) == (len(LOCAL), len(LOCAL))
        assert (found["different"], found["same"]) == (different, len(LOCAL) - different)
        assert found["sum"] == pytest.approx(lost, abs=0.01 * len(LOCAL))
    assert measured["right"]["different"] <= 1
    assert measured["beside"]["different"] >= 3
    assert measured["beside"]["sum"] > measured["right"]["sum"] + 0.2 * len(LOCAL)


def test_how_a_client_samples_does_not_matter(checked_server: Server, client: openai.OpenAI) -> None:
    watched = Watched(checked_server)
    scene, question = LOCAL[0]
    base: Any = {"model": MODEL, "messages": question_about(scene.picture(), question.text), "max_tokens": 3}
    crop: Any = {"crop": {"regions": right(question)}}
    client.chat.completions.create(**base, temperature=2.0, n=3, seed=1, extra_body=crop)
    watched.wait_for(1)
    constrained = {**crop, "structured_outputs": {"regex": "[0-9]+"}}
    client.chat.completions.create(**base, extra_body=constrained)
    watched.wait_for(2)
    for _ in client.chat.completions.create(**base, stream=True, extra_body=crop):
        pass
    found = watched.wait_for(3)
    assert (found["compared"], found["same"]) == (3, 3)


def test_only_pruned_answers_are_checked_and_checks_are_no_requests_of_clients(
    checked_server: Server, client: openai.OpenAI
) -> None:
    watched = Watched(checked_server)
    counted = ("crop:requests_total", "crop:images_total", "crop:localizations_total")
    before = [metric(checked_server, name) for name in counted]
    scene, question = LOCAL[1]
    messages = question_about(scene.picture(), question.text)
    ask(client, scene.picture(), question.text, {"method": "off"})
    ask(client, scene.picture(), question.text, {"localize": "off"})
    tokenize = {"model": MODEL, "messages": messages, "crop": {"regions": right(question)}}
    httpx2.post(f"{checked_server.base_url}/tokenize", json=tokenize, timeout=60).raise_for_status()
    refused = {**tokenize, "prompt_logprobs": 1, "max_tokens": 1}
    refused["crop"] = {"regions": right(question), "method": "ilp"}
    url = f"{checked_server.base_url}/v1/chat/completions"
    assert httpx2.post(url, json=refused, timeout=60).status_code == 400
    ask(client, scene.picture(), question.text, {"regions": right(question)})
    found = watched.wait_for(1)
    watched.wait_until_idle()
    assert sum(found[one] for one in ("compared", "dropped", "failed", "timeout")) == 1
    assert [metric(checked_server, name) for name in counted] == [before[0] + 3, before[1] + 3, before[2]]


def test_a_flood_is_answered_and_what_cannot_be_held_is_dropped(
    checked_server: Server, client: openai.OpenAI
) -> None:
    watched = Watched(checked_server)
    # A connection that nobody has used for five seconds is closed, maybe just when it is used again.
    again = client.with_options(max_retries=2)

    def one(number: int) -> str:
        scene, question = LOCAL[number % len(LOCAL)]
        crop = {"regions": right(question)}
        response = ask(again, marked(scene.picture(), number), question.text, crop)
        content: str = response.parse().choices[0].message.content
        return content

    with ThreadPoolExecutor(32) as pool:
        assert len(list(pool.map(one, range(64)))) == 64
    found = watched.wait_for(64)
    watched.wait_until_idle()
    assert found["compared"] + found["dropped"] == 64
    assert found["dropped"] > 0
    assert found["compared"] > 0


def test_a_client_that_hangs_up_leaves_nothing_behind(checked_server: Server) -> None:
    watched = Watched(checked_server)
    scene, question = LOCAL[2]
    body = {
        "model": MODEL,
        "messages": question_about(scene.picture(), question.text),
        "crop": {"regions": right(question)},
        "max_tokens": 1800,
        "ignore_eos": True,
        "temperature": 0,
    }
    url = f"{checked_server.base_url}/v1/chat/completions"
    for _ in range(6):  # more than are held
        with httpx2.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            assert response.status_code == 200
            next(response.iter_lines())
        # An idle machine writes 1800 tokens in about two seconds, and a busy one may keep the client waiting.
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(url, json=body, timeout=0.1)
    watched.wait_until_idle()
    time.sleep(1)
    watched.wait_until_idle()
    assert not any(watched.now().values())
    # What they held is free again.
    httpx2.post(url, json={**body, "max_tokens": 2}, timeout=60).raise_for_status()
    assert watched.wait_for(1)["compared"] == 1


def test_nothing_went_wrong(checked_server: Server) -> None:
    log = checked_server.log_path.read_text()
    assert "Traceback" not in log
    assert "\nERROR" not in log
    assert metric(checked_server, CHECKS, outcome="failed") == 0
    assert "crop:shadow_logprob_lost_nats_bucket" in get_text(f"{checked_server.base_url}/metrics")
