# SPDX-License-Identifier: Apache-2.0
"""Requests that mean harm, or look as if: each is answered or refused, and the next one is answered right."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from vllm.utils.serial_utils import tensor2base64

from lab.evaluation.questions import make_test_set
from tests.e2e.conftest import MODEL, OPERATORS, OPTIONS, metric, serve
from tests.tinyvqa import CHECKPOINT, ENGINE, ask, crop_options, facts, found
from vllm_crop.client import data_url, question_about
from vllm_crop.crop_params import MAX_FIELD_BYTES, MAX_KEYS
from vllm_crop.measuring.server import Server, get_text

pytestmark = pytest.mark.e2e

SCENES = make_test_set(8, seed=11)
LOCAL = [(scene, q.text) for scene in SCENES for q in scene.questions if q.boxes]
BOX, OTHER = [0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.6, 0.6]
SLOWEST_HEALTH_S = 1.0


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    """Finds regions itself, is prepared to evict, has limits for clients."""
    limits = {"max_pruning_rate": 0.9}
    crop = crop_options(ENGINE, eviction_layers=[1], compression="prune", limits=limits)
    with serve(str(CHECKPOINT), *crop, *OPTIONS, *OPERATORS, log_path=logs / "hostile.log") as running:
        yield running


@pytest.fixture
def stock(stock_server: Server) -> Server:
    return stock_server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(autouse=True)
def _answers_rightly_afterwards(server: Server, client: openai.OpenAI) -> Iterator[None]:
    yield
    scene = SCENES[-1]
    question = next(q for q in scene.questions if q.boxes)
    answer = ask(client, scene.picture(), question.text)
    assert answer.parse().choices[0].message.content.strip() == question.answer
    assert found(answer)["source"] == "engine"


def post(server: Server, route: str, body: Any, timeout: float = 60) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return httpx2.post(f"{server.base_url}{route}", content=content, headers=headers, timeout=timeout)


def part(picture: Image.Image | None, uuid: str | None = None) -> dict[str, Any]:
    image = None if picture is None else {"url": data_url(picture)}
    return {"type": "image_url", "image_url": image, **({} if uuid is None else {"uuid": uuid})}


def chat(parts: list[Any], question: str, **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": question}]
    defaults = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    return {**defaults, "messages": [{"role": "user", "content": content}], **more}


def noise(number: int, size: tuple[int, int]) -> Image.Image:
    scene = SCENES[number % len(SCENES)].picture()
    scene.putpixel((0, 0), (number % 256, number // 256, 77))
    return scene.resize(size)


@contextmanager
def health_watched(server: Server) -> Iterator[None]:
    """Ask for the server's health all the time; it must answer soon."""
    slowest, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            start = time.monotonic()
            get_text(f"{server.base_url}/health")
            slowest[0] = max(slowest[0], time.monotonic() - start)
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as watching:
        watcher = watching.submit(watch)
        try:
            yield
        finally:
            done.set()
            watcher.result()
    assert slowest[0] < SLOWEST_HEALTH_S


def test_the_localizer_is_warm_before_anyone_asks(server: Server) -> None:
    """The first of all tests here: the server has asked itself once, for nobody."""
    assert metric(server, "vllm:request_success_total") == 1
    assert metric(server, "crop:localizations_total") == 0


# A name for two images.

SIZES = ((168, 168), (336, 336))


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/invocations"])
@pytest.mark.parametrize("method", ["plc", "ilp", "plc+ilp", "off"])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1]], ids=["small first", "large first"])
def test_one_name_for_two_images_is_a_400_that_names_it(
    server: Server, sizes: tuple[Any, Any], method: str, route: str
) -> None:
    parts = [part(noise(index, size), "u") for index, size in enumerate(sizes)]
    crop = {"regions": [BOX, OTHER], "method": method, "pruning_rate": 0.5}
    response = post(server, route, chat(parts, "?", crop=crop))
    assert response.status_code == 400, response.text
    assert "uuid: 'u' stands for two different images" in response.text


def test_one_name_for_two_images_in_two_requests_is_answered_by_each(server: Server) -> None:
    crop = {"regions": [BOX], "method": "plc", "pruning_rate": 0.5}
    for number, size in ((1, SIZES[0]), (2, SIZES[1]), (1, SIZES[0])):
        picture = noise(number, size)
        with_name, without = (
            post(
                server,
                "/v1/chat/completions",
                chat([part(picture, uuid)], LOCAL[0][1], crop=crop, logprobs=True),
            )
            for uuid in ("moving", None)
        )
        assert with_name.status_code == without.status_code == 200, with_name.text
        assert without.json()["usage"]["prompt_tokens"] == with_name.json()["usage"]["prompt_tokens"]
        said = [response.json()["choices"][0]["logprobs"] for response in (with_name, without)]
        assert said[0]["content"][0]["logprob"] == pytest.approx(said[1]["content"][0]["logprob"], abs=1e-4)


# What the server does on its own.


def test_a_name_alone_keeps_its_region_and_gets_others(server: Server, client: openai.OpenAI) -> None:
    (scene, question), (_, another) = LOCAL[0], LOCAL[1]
    picture = noise(7, scene.picture().size)
    sent = post(server, "/v1/chat/completions", chat([part(picture, "kept")], question))
    alone = post(server, "/v1/chat/completions", chat([part(None, "kept")], question))
    other = post(server, "/v1/chat/completions", chat([part(None, "kept")], another))
    fresh = post(server, "/v1/chat/completions", chat([part(picture)], another))
    assert [r.status_code for r in (sent, alone, other)] == [200] * 3, (alone.text, other.text)
    assert found(alone)["region"] == found(sent)["region"]
    assert found(alone)["localizer"]["cached"]
    assert found(other)["region"] == found(fresh)["region"]
    for one, same in ((alone, sent), (other, fresh)):
        assert one.json()["choices"][0]["message"] == same.json()["choices"][0]["message"]


@pytest.mark.parametrize("kwargs", [{"max_pixels": 128 * 128}, {"do_sample_frames": False}])
def test_processor_settings_of_a_request_are_no_error_where_a_region_would_be_found(
    server: Server, stock: Server, kwargs: dict[str, Any]
) -> None:
    scene, question = LOCAL[2]
    body = chat([part(scene.picture())], question, mm_processor_kwargs=kwargs)
    ours, theirs = (post(one, "/v1/chat/completions", body) for one in (server, stock))
    assert ours.status_code == theirs.status_code == 200, ours.text
    assert ours.json()["usage"]["prompt_tokens"] == theirs.json()["usage"]["prompt_tokens"]
    assert found(ours)["region"] is None


def test_a_client_that_names_regions_beside_such_settings_is_told(server: Server) -> None:
    body = chat([part(LOCAL[2][0].picture())], "?", mm_processor_kwargs={"max_pixels": 9999})
    response = post(server, "/v1/chat/completions", {**body, "crop": {"regions": [BOX]}})
    assert response.status_code == 400
    assert "max_pixels" in response.text


def test_nothing_of_an_unpruned_image_counts_as_saved(server: Server) -> None:
    """The request's own settings make the picture small; pruning is off."""
    body = chat([part(noise(9, (384, 384)))], "?", mm_processor_kwargs={"max_pixels": 128 * 128})
    said = facts(post(server, "/v1/chat/completions", {**body, "crop": {"method": "off"}}))
    assert said["tokens"] == said["tokens_after_plc"] == said["tokens_avg"] < 576


def test_a_preview_shows_what_the_server_does_and_not_what_it_would_do_itself(
    server: Server, tmp_path: Path
) -> None:
    """At another rate, another way of compressing than the command's own."""
    scene, question = LOCAL[2]
    scene.picture().save(tmp_path / "scene.png")
    arguments = ["preview", "scene.png", question, "--base-url", f"{server.base_url}/v1"]
    launch = "from vllm_crop.commands.app import app; app()"
    command = [sys.executable, "-c", launch, *arguments]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=wide)
    assert done.returncode == 0, done.stderr
    assert "576 -> 64 tokens" in done.stdout
    assert "others kept" in done.stdout
    assert "pooled" not in done.stdout
    refused = subprocess.run(
        [*command, "--compression", "pool"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=wide,
    )
    assert refused.returncode == 2
    assert "requests cannot choose" in refused.stderr


# Refused before work, and before caches believe something.


@pytest.mark.parametrize("wrong", [{"prompt_logprobs": 1}, {"truncate_prompt_tokens": 20}])
def test_a_refused_request_leaves_no_trace_in_vllms_cache(server: Server, wrong: dict[str, Any]) -> None:
    crop = {"regions": [BOX], "method": "ilp", "pruning_rate": 0.5}
    body = chat([part(noise(500 + len(str(wrong)), (336, 336)))], "?", crop=crop)
    refused = post(server, "/v1/chat/completions", {**body, **wrong})
    assert refused.status_code == 400
    assert next(iter(wrong)) in refused.text
    assert post(server, "/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 7}, {"logprobs": True, "top_logprobs": 10**6}]
)
def test_wrong_parameters_cost_no_localization(server: Server, wrong: dict[str, Any]) -> None:
    before = metric(server, "vllm:request_success_total")
    body = chat([part(noise(21, (384, 384)))], "What number is on the red circle?")
    assert post(server, "/v1/chat/completions", {**body, **wrong}).status_code == 400
    assert metric(server, "vllm:request_success_total") == before
    assert post(server, "/v1/chat/completions", body).status_code == 200


def test_a_prompt_that_can_never_fit_costs_no_localization(server: Server) -> None:
    before = metric(server, "vllm:request_success_total")
    many = [part(noise(22, (384, 384)))] * 8
    response = post(server, "/v1/chat/completions", chat(many, "red " * 1800))
    assert response.status_code == 400, response.text
    assert metric(server, "vllm:request_success_total") == before


def test_prompt_logprobs_take_the_evictions_that_the_server_chose_away(server: Server) -> None:
    """They are asked for together by a client that knows nothing of pruning."""
    scene, question = LOCAL[3]
    body = chat([part(noise(23, scene.picture().size))], question, prompt_logprobs=1)
    for method in ("ilp", "plc+ilp"):
        response = post(server, "/v1/chat/completions", {**body, "crop": {"method": method}})
        assert response.status_code == 200, response.text
        said = facts(response)
        assert said["tokens_avg"] == said["tokens_after_plc"]
        assert said["tokens_after_plc"] == 576 or method == "plc+ilp"


def test_so_they_do_of_a_prompt_that_is_cut(server: Server) -> None:
    scene, question = LOCAL[3]
    body = chat([part(noise(25, scene.picture().size))], question, prompt_logprobs=0)
    whole = post(server, "/v1/chat/completions", {**body, "crop": {"method": "off"}}).json()
    limit = whole["usage"]["prompt_tokens"] - 1
    cut = {**body, "truncate_prompt_tokens": limit}
    wanted, got = (
        post(server, "/v1/chat/completions", {**cut, "crop": {"method": method}}) for method in ("off", "ilp")
    )
    assert found(got)["source"] == "engine"
    wanted_rows, rows = wanted.json()["prompt_logprobs"], got.json()["prompt_logprobs"]
    assert len(rows) == len(wanted_rows) == limit
    for wanted_row, row in zip(wanted_rows[1:], rows[1:], strict=True):
        assert row.keys() == wanted_row.keys()
        for token, one in wanted_row.items():
            assert row[token]["logprob"] == pytest.approx(one["logprob"], abs=1e-4)
    assert got.json()["choices"] == wanted.json()["choices"]


def test_min_tokens_is_no_wrong_parameter(server: Server) -> None:
    scene, question = LOCAL[0]
    body = chat([part(noise(24, scene.picture().size))], question, min_tokens=2)
    assert found(post(server, "/v1/chat/completions", body))["localizer"]["outcome"] != "not_asked"


def test_who_asks_for_too_much_takes_no_image_from_others(server: Server) -> None:
    """One client's request is refused while others ask about the same image, new to the server each time."""
    crop = {"regions": [BOX], "method": "ilp", "pruning_rate": 0.5}
    for number in range(8):
        body = chat([part(noise(300 + number, (336, 336)))], "?", crop=crop)
        bodies = [{**body, "prompt_logprobs": 1}, body, body]
        with ThreadPoolExecutor(3) as pool:
            statuses = list(pool.map(lambda b: post(server, "/v1/chat/completions", b).status_code, bodies))
        assert statuses == [400, 200, 200]


def test_a_prompt_cut_to_nothing_takes_no_image_from_others(server: Server) -> None:
    """vLLM finds no place for its image when it has processed it, and stock forgets to forget it."""
    body = chat([part(noise(61, (200, 200)))], "?", max_tokens=2)
    cut = post(server, "/v1/chat/completions", {**body, "truncate_prompt_tokens": 1})
    assert cut.status_code >= 400
    for _ in range(2):
        assert post(server, "/v1/chat/completions", body).status_code == 200


def test_prompt_logprobs_where_nothing_is_evicted(server: Server) -> None:
    for images, crop in (
        ([], {"max_tokens": 20, "method": "ilp"}),
        ([part(noise(62, (200, 200)))], {"max_tokens": 20, "method": "plc+ilp"}),
        ([part(noise(63, (200, 200)))], {"max_tokens": 0, "method": "ilp"}),
    ):
        body = chat(images, "?", max_tokens=1, prompt_logprobs=1, crop=crop)
        answer = post(server, "/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text


def test_history_beside_embeddings_is_refused(server: Server) -> None:
    rows = {"image_embeds": torch.ones(16, 128), "image_grid_thw": torch.tensor([1, 8, 8])}
    embedded = {
        "type": "image_embeds",
        "image_embeds": {name: tensor2base64(tensor) for name, tensor in rows.items()},
    }
    body = chat([embedded], "?")
    (turn,) = body["messages"]
    for turns, status in ((1, 200), (2, 400)):
        history = {"keep": 1, "max_tokens": 4, "stride": 1}
        asked = {**body, "messages": [turn] * turns, "crop": {"history": history}}
        answer = post(server, "/v1/chat/completions", asked)
        assert answer.status_code == status, answer.text
        assert status == 200 or "crop.history" in answer.text


def test_a_batch_that_is_localized_takes_no_image_from_others(server: Server) -> None:
    """Whenever others ask: while one of its pictures is localized, processed, or waits for the last."""
    scene, question = LOCAL[1]
    for number, delay in enumerate((0.02, 0.05, 0.1, 0.2)):
        first = noise(400 + 10 * number, scene.picture().size)
        others = [noise(401 + 10 * number + index, scene.picture().size) for index in range(6)]
        batch = {
            "model": MODEL,
            "messages": [question_about(picture, question) for picture in (first, *others)],
            "max_tokens": 3,
        }
        with ThreadPoolExecutor(5) as pool:
            running = pool.submit(post, server, "/v1/chat/completions/batch", batch)
            time.sleep(delay)
            bodies = [chat([part(picture)], question) for picture in (first, *others[:3])]
            victims = [pool.submit(post, server, "/v1/chat/completions", body) for body in bodies]
            for victim in victims:
                assert victim.result().status_code == 200, victim.result().text
            assert running.result().status_code == 200, running.result().text


def test_embeddings_of_several_images_are_left_as_they_are(server: Server, stock: Server) -> None:
    """vLLM makes one item of them for some families: nothing is sought, and nothing is refused."""
    rows = {"image_embeds": torch.ones(16, 128), "image_grid_thw": torch.tensor([1, 8, 8])}
    encoded = {name: tensor2base64(tensor) for name, tensor in rows.items()}
    for count in (1, 2):
        embedded = [{"type": "image_embeds", "image_embeds": encoded}] * count
        ours, theirs = (post(one, "/v1/chat/completions", chat(embedded, "?")) for one in (server, stock))
        assert ours.status_code == theirs.status_code == 200, ours.text
        assert ours.json()["usage"]["prompt_tokens"] == theirs.json()["usage"]["prompt_tokens"]


# Bounds before parsing.


def junk(num_keys: int) -> bytes:
    keys = ",".join(f'"k{number}":0' for number in range(num_keys))
    return b'{"model":"m","prompt":"x","crop":{' + keys.encode() + b"}}"


def test_a_million_unknown_keys_stop_nobody(server: Server) -> None:
    body = junk(1_000_000)
    with health_watched(server):
        for _ in range(3):
            response = post(server, "/tokenize", body)
            assert response.status_code == 400
            assert response.json()["error"]["message"] == f"crop: longer than {MAX_FIELD_BYTES >> 10} KiB"
    few = post(server, "/tokenize", junk(10_000))
    assert few.json()["error"]["message"] == f"crop: at most {MAX_KEYS} keys, got 10000"


def test_escapes_elsewhere_in_a_large_body_cost_nothing(server: Server) -> None:
    body = b'{"model": "%s", "prompt": "\\u0041", "more": "%s"}' % (MODEL.encode(), b"x" * 8_000_000)
    with health_watched(server):
        assert post(server, "/tokenize", body).status_code == 200


@pytest.mark.parametrize("spelled", ["crop", "\\u0063rop", "cro\\u0070", "\\u0063\\u0072\\u006F\\u0070"])
def test_the_field_is_found_in_every_spelling(server: Server, spelled: str) -> None:
    body = b'{"model": "%s", "prompt": "x", "%s": {"regions": 1}}' % (MODEL.encode(), spelled.encode())
    assert post(server, "/tokenize", body).status_code == 400


# Nothing leaks between tenants.


def test_tokenizing_tells_nothing_of_what_others_have_asked(server: Server, client: openai.OpenAI) -> None:
    scene, question = LOCAL[4]
    picture = noise(30, scene.picture().size)
    body = {"model": MODEL, "messages": question_about(picture, question)}
    before = post(server, "/tokenize", body).json()["count"]
    assert found(ask(client, picture, question))["region"] is not None
    assert post(server, "/tokenize", body).json()["count"] == before


def test_counting_tokens_asks_nobody_and_counts_for_nobody(server: Server) -> None:
    before = [metric(server, name) for name in ("vllm:request_success_total", "crop:requests_total")]
    source = {"type": "base64", "media_type": "image/png", "data": data_url(noise(32, (384, 384)))[22:]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": LOCAL[0][1]}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    response = post(server, "/v1/messages/count_tokens", body)
    assert response.status_code == 200
    assert response.json()["input_tokens"] > 576
    after = [metric(server, name) for name in ("vllm:request_success_total", "crop:requests_total")]
    assert after == before


def test_a_name_alone_is_not_decoded_where_nobody_looks(server: Server) -> None:
    """A small file of 81 megapixels, named eight times: by who only counts tokens, and in vain."""
    huge = io.BytesIO()
    Image.new("L", (9000, 9000), 77).save(huge, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(huge.getvalue()).decode()}"
    sent = {"type": "image_url", "image_url": {"url": url}, "uuid": "huge"}
    question = LOCAL[0][1]
    assert post(server, "/v1/chat/completions", chat([sent], question)).status_code in (200, 400)
    body = chat([part(None, "huge")] * 8, question)
    with health_watched(server):
        for more, route in (({}, "/tokenize"), ({"temperature": -1}, "/v1/chat/completions")):
            start = time.monotonic()
            assert post(server, route, {**body, **more}).status_code == 400
            assert time.monotonic() - start < 2


def test_salts_keep_answers_of_the_localizer_apart(server: Server, client: openai.OpenAI) -> None:
    scene, question = LOCAL[5]
    picture = noise(31, scene.picture().size)
    regions = []
    for salt, cached in (("a", False), ("b", False), (None, False), ("a", True), ("b", True)):
        image = found(ask(client, picture, question, body={"cache_salt": salt} if salt else {}))
        assert image["localizer"]["cached"] is cached, salt
        regions.append(image["region"])
    assert all(region == regions[0] for region in regions)


# All of it at random, against stock vLLM.

PICTURES = [
    noise(40 + index, size) for index, size in enumerate([(56, 56), (384, 384), (96, 400), (336, 336)])
]
boxes = st.lists(st.floats(-0.2, 1.2) | st.just("x"), min_size=3, max_size=5)
crops = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "regions": st.lists(
            st.none() | st.just(BOX) | boxes | st.lists(st.just(OTHER), max_size=18), max_size=3
        ),
        "pruning_rate": st.sampled_from([0, 0.3, 0.889, 0.95, -1, "0.5"]),
        "method": st.sampled_from(["plc", "ilp", "plc+ilp", "off", "best"]),
        "localize": st.sampled_from(["pinned", "latest", "off", 5]),
        "question": st.sampled_from(["What number is on the red circle?", "", "x" * 5000]),
        "unknown": st.just(1),
    },
)
pictures = st.tuples(st.integers(0, len(PICTURES) - 1), st.booleans(), st.booleans())


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    images=st.lists(pictures, max_size=3),
    crop=crops,
    options=st.fixed_dictionaries(
        {},
        optional={
            "cache_salt": st.sampled_from(["a", "b"]),
            "temperature": st.sampled_from([0, -1]),
            "prompt_logprobs": st.just(1),
            "mm_processor_kwargs": st.sampled_from(
                [{"max_pixels": 200 * 200}, {"do_sample_frames": True}, {}]
            ),
            "media_io_kwargs": st.just({"image": {"rgba_background_color": [0, 0, 0]}}),
            "n": st.sampled_from([1, 2]),
        },
    ),
)
def test_any_request_is_answered_as_stock_vllm_does_where_it_is_not_pruned(
    server: Server, stock: Server, images: list[Any], crop: Any, options: dict[str, Any]
) -> None:
    # A picture has one name: what stock vLLM makes of one that moves is what we mend.
    parts = [
        part(PICTURES[index] if sent else None, f"picture-{index}" if named or not sent else None)
        for index, sent, named in images
    ]
    body = chat(parts, "What number is on the red circle?", **options)
    ours = post(server, "/v1/chat/completions", body if crop is None else {**body, "crop": crop})
    theirs = post(stock, "/v1/chat/completions", body)
    assert ours.status_code < 500, ours.text
    if ours.status_code == 400 and crop is not None and theirs.status_code == 200:
        # Refused for its field alone; or for a list of regions of another length, a rate out of reach.
        assert ours.json()["error"]["param"].startswith(("crop", "prompt_logprobs")), ours.text
        # Both have seen the same images afterwards.
        assert post(server, "/v1/chat/completions", body).status_code == 200
        return
    if theirs.status_code >= 500:
        return  # its cache has drifted from its engine's; ours must not
    assert ours.status_code == theirs.status_code, (ours.text[:300], theirs.text[:300])
    if ours.status_code != 200:
        return
    if "x-crop-facts" not in ours.headers or facts(ours)["tokens_avg"] == facts(ours)["tokens"]:
        said = [[choice["message"]["content"] for choice in r.json()["choices"]] for r in (ours, theirs)]
        assert said[0] == said[1]
        assert ours.json()["usage"]["prompt_tokens"] == theirs.json()["usage"]["prompt_tokens"]


def test_nothing_is_left_in_the_engine(server: Server) -> None:
    """After all of the above."""
    deadline = time.monotonic() + 30
    while metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline, "requests are left in the engine"
        time.sleep(0.1)
    assert metric(server, "vllm:kv_cache_usage_perc") == 0
    tracebacks = server.log_path.read_text().count("Traceback")
    assert not tracebacks, "clients can fill the log"
