# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --plugin crop` that finds regions itself, on two API server processes."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import psutil
import pytest
from PIL import Image

from lab.evaluation.answerers import Answerers
from lab.evaluation.asking import SceneTask
from lab.evaluation.conditions import OFF, Condition
from lab.evaluation.options import Options
from lab.evaluation.questions import TestScene, make_test_set
from lab.evaluation.session import locations, make_tasks
from lab.evaluation.transformers_answers import TransformersAnswers
from tests.e2e.conftest import API_KEY, MODEL, metric
from tests.tinyvqa import CHECKPOINT, ask, facts, found, said_of_thumbnail
from vllm_crop.client import data_url, question_about
from vllm_crop.measuring.server import Server, get_text
from vllm_crop.planning.geometry import Region

pytestmark = pytest.mark.e2e

SCENES = make_test_set(6, seed=3)
LOCAL = [(scene, q.text) for scene in SCENES for q in scene.questions if q.boxes]
GLOBAL = [(scene, q.text) for scene in SCENES for q in scene.questions if not q.boxes]


@pytest.fixture(scope="module")
def server(localizing_server: Server) -> Server:
    return localizing_server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=API_KEY, max_retries=0)


def marked(scene: TestScene, number: int) -> Image.Image:
    """A picture of the scene that no cache has seen."""
    picture = scene.picture()
    picture.putpixel((0, 0), (number % 256, number // 256, 99))
    return picture


def as_region(lists: Any) -> Any:
    return [pytest.approx(box, abs=1e-4) for box in lists]


def test_the_region_is_what_the_model_says_of_a_thumbnail(client: openai.OpenAI) -> None:
    for scene, question in LOCAL:
        region, confidence = said_of_thumbnail(client, scene.picture(), question)
        image = found(ask(client, scene.picture(), question))
        assert region is not None
        assert image["region"] == as_region(region.as_lists())
        assert image["source"] == "engine"
        assert image["localizer"]["outcome"] == "region"
        assert image["localizer"]["confidence"] == pytest.approx(confidence, abs=2e-4)
        assert (image["tokens"], image["tokens_after_plc"]) == (576, 64)


def test_most_answers_are_right_and_the_header_tells_the_localizers_time(client: openai.OpenAI) -> None:
    right = 0
    for scene in SCENES:
        for question in scene.questions:
            response = ask(client, scene.picture(), question.text)
            right += response.parse().choices[0].message.content == question.answer
            assert facts(response)["localizer_ms"] > 0
    assert right / sum(len(scene.questions) for scene in SCENES) > 0.7


@pytest.mark.parametrize(("method", "rate"), [("plc", 0.667), ("plc", 0.778), ("plc", 0.889), ("ilp", 0.889)])
def test_it_answers_as_the_offline_evaluation_does(
    server: Server, method: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain transformers with regions that it was asked for one by one, against regions the server finds."""
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    on_server, offline = Condition(method, "server", rate), Condition(method, "localizer", rate)
    options = Options(CHECKPOINT, 1, (on_server,), "vllm", f"{server.base_url}/v1", (1,), 0, Path())
    endpoint, plain = Answerers(options)(on_server), TransformersAnswers(CHECKPOINT, (1,))
    located = locations(SCENES, list(chain.from_iterable(plain.answer(*asking(Condition("locate"))))))
    expected = list(chain.from_iterable(plain.answer(*asking(offline, located))))
    answers = list(chain.from_iterable(endpoint.answer(*asking(on_server))))
    assert [one.text for one in answers] == [one.text for one in expected]
    for field in ("visual_tokens", "prompt_tokens"):
        counts = [[getattr(one, field) for one in some] for some in (answers, expected)]
        assert counts[0] == pytest.approx(counts[1])
    unpruned = list(chain.from_iterable(plain.answer(*asking(OFF))))
    assert sum(one.visual_tokens < 576 for one in answers) >= len(LOCAL) - 1
    assert [one.visual_tokens for one in answers] != [one.visual_tokens for one in unpruned]


def asking(cell: Condition, located: Any = None) -> tuple[Condition, list[SceneTask]]:
    """All questions of the scenes."""
    return cell, make_tasks(cell, SCENES, located)


def test_a_global_question_gets_the_whole_image(client: openai.OpenAI) -> None:
    outcomes = [found(ask(client, scene.picture(), question)) for scene, question in GLOBAL]
    whole = [image for image in outcomes if image["localizer"]["outcome"] == "global"]
    assert len(whole) >= 0.9 * len(outcomes)
    for image in whole:
        assert (image["source"], image["region"]) == ("engine", None)
        assert image["tokens_after_plc"] == 576


def test_every_api_finds_the_same_region(server: Server, client: openai.OpenAI) -> None:
    scene, question = LOCAL[0]
    picture = scene.picture()
    expected = found(ask(client, picture, question))["region"]
    stream = ask(client, picture, question, stream=True)
    assert found(stream)["region"] == expected
    list(stream.parse())
    content = [
        {"type": "input_image", "image_url": data_url(picture), "detail": "auto"},
        {"type": "input_text", "text": question},
    ]
    response = client.responses.with_raw_response.create(
        model=MODEL, input=[{"role": "user", "content": content}], max_output_tokens=5, temperature=0
    )
    assert found(response)["region"] == expected
    source = {"type": "base64", "media_type": "image/png", "data": data_url(picture).partition(",")[2]}
    anthropics = anthropic.Anthropic(base_url=server.base_url, auth_token=API_KEY, max_retries=0)
    message = anthropics.messages.with_raw_response.create(
        model=MODEL,
        max_tokens=5,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image", "source": source}, {"type": "text", "text": question}],
            }
        ],
        extra_body={"temperature": 0},
    )
    assert found(message)["region"] == expected


def test_conversations_of_a_batch_are_localized_apart(client: openai.OpenAI) -> None:
    cases = [LOCAL[0], LOCAL[7]]
    body = {
        "model": MODEL,
        "messages": [question_about(scene.picture(), question) for scene, question in cases],
        "max_tokens": 5,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {API_KEY}"}
    response = httpx2.post(f"{client.base_url}chat/completions/batch", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    regions = [image["region"] for image in facts(response)["images"]]
    alone = [found(ask(client, scene.picture(), question))["region"] for scene, question in cases]
    assert sorted(map(str, regions)) == sorted(map(str, alone))


def test_every_method_takes_the_region(client: openai.OpenAI) -> None:
    scene, question = LOCAL[1]
    regions = [
        found(ask(client, scene.picture(), question, {"method": method}))
        for method in ("plc", "ilp", "plc+ilp")
    ]
    assert len({str(image["region"]) for image in regions}) == 1
    assert all(image["tokens_avg"] == pytest.approx(64, abs=1) for image in regions)


def test_the_client_knows_better(server: Server, client: openai.OpenAI) -> None:
    scene, question = LOCAL[0]
    before = metric(server, "crop:localizations_total")
    box = [0.0, 0.0, 0.5, 0.5]
    assert found(ask(client, scene.picture(), question, {"regions": [box]}))["region"] == [box]
    assert found(ask(client, scene.picture(), question, {"regions": [None]}))["source"] == "none"
    assert found(ask(client, scene.picture(), question, {"method": "off"}))["source"] == "off"
    assert found(ask(client, scene.picture(), question, {"localize": "off"}))["source"] == "none"
    assert metric(server, "crop:localizations_total") == before


def test_the_request_can_name_the_question(client: openai.OpenAI) -> None:
    (scene, question), (_, other) = LOCAL[0], LOCAL[1]
    expected = found(ask(client, scene.picture(), question))["region"]
    assert found(ask(client, scene.picture(), other, {"question": question}))["region"] == expected
    assert found(ask(client, scene.picture(), other))["region"] != expected


def test_an_image_without_a_question_is_served_whole_and_counted(
    server: Server, client: openai.OpenAI
) -> None:
    before = metric(server, "crop:localizations_total", outcome="no_question")
    parts = question_about(LOCAL[0][0].picture(), "")[0]["content"][:1]
    response = ask(client, LOCAL[0][0].picture(), "", messages=[{"role": "user", "content": parts}])
    assert found(response)["localizer"]["outcome"] == "no_question"
    assert found(response)["tokens_after_plc"] == 576
    assert metric(server, "crop:localizations_total", outcome="no_question") == before + 1


def conversation(*questions: str, picture: Image.Image) -> list[Any]:
    """A picture with the first question, answers, and more questions."""
    turns = question_about(picture, questions[0])
    for question in questions[1:]:
        turns += [{"role": "assistant", "content": "7"}, {"role": "user", "content": question}]
    return turns


def test_an_old_image_keeps_its_region_unless_asked_otherwise(client: openai.OpenAI) -> None:
    (scene, question), (_, other) = LOCAL[0], LOCAL[1]
    picture = scene.picture()
    first, second = (found(ask(client, picture, text))["region"] for text in (question, other))
    assert first != second
    turns = conversation(question, other, picture=picture)
    assert found(ask(client, picture, "", messages=turns))["region"] == first
    assert found(ask(client, picture, "", {"localize": "latest"}, messages=turns))["region"] == second


def test_two_images_are_localized_apart(client: openai.OpenAI) -> None:
    (scene, question), (other_scene, _) = LOCAL[0], LOCAL[6]
    one, other = question_about(scene.picture(), question), question_about(other_scene.picture(), question)
    parts = [one[0]["content"][0], other[0]["content"][0], one[0]["content"][1]]
    response = ask(client, scene.picture(), "", messages=[{"role": "user", "content": parts}])
    images = facts(response)["images"]
    assert images[0]["region"] == found(ask(client, scene.picture(), question))["region"]
    assert images[1]["region"] == found(ask(client, other_scene.picture(), question))["region"]
    assert facts(response)["localizer_ms"] == max(image["localizer"]["ms"] for image in images)


def test_tokenizing_asks_nobody(server: Server, client: openai.OpenAI) -> None:
    scene, question = LOCAL[2]
    before = metric(server, "crop:localizations_total")
    body = {"model": MODEL, "messages": question_about(marked(scene, 1), question)}
    counted = client.post(f"{server.base_url}/tokenize", body=body, cast_to=object)
    assert counted["count"] > 576  # type: ignore[index]
    assert metric(server, "crop:localizations_total") == before


def test_the_localizers_prompt_is_a_fifth_of_the_full_one_or_less(client: openai.OpenAI) -> None:
    scene, question = LOCAL[0]
    full = ask(client, scene.picture(), question, {"method": "off"}).parse().usage.prompt_tokens
    from lab.tinyvqa import words
    from lab.tinyvqa.drawing import thumbnail

    asked = ask(client, thumbnail(scene.picture()), words.LOCATE + question, {"method": "off"})
    assert asked.parse().usage.prompt_tokens <= 0.2 * full


def test_known_regions_are_not_asked_for_again_and_metrics_add_up(
    server: Server, client: openai.OpenAI
) -> None:
    names = ("crop:localizations_total", "crop:localizer_cache_hits_total", "crop:localizer_seconds_count")
    before = [metric(server, name, localizer="engine") for name in names]
    scene, question = LOCAL[3]
    picture = marked(scene, 2)
    images = []
    for _ in range(12):  # new connections, so that both processes get some
        fresh = openai.OpenAI(base_url=client.base_url, api_key=API_KEY)
        images.append(found(ask(fresh, picture, question)))
        fresh.close()
    asked, hits, timed = (
        metric(server, name, localizer="engine") - old for name, old in zip(names, before, strict=True)
    )
    assert len({str(image["region"]) for image in images}) == 1
    assert hits == sum(image["localizer"]["cached"] for image in images) >= 10
    assert (asked, timed) == (12, 12 - hits)


def test_metrics_add_up_over_both_api_servers(server: Server, client: openai.OpenAI) -> None:
    names = ("crop:visual_tokens_total", "crop:visual_tokens_retained_total")
    before = [metric(server, name, model_name=MODEL) for name in names]
    pruned = metric(server, "crop:requests_total", outcome="pruned")
    scene, question = LOCAL[3]
    for _ in range(12):  # new connections, so that both processes get some
        fresh = openai.OpenAI(base_url=client.base_url, api_key=API_KEY)
        ask(fresh, scene.picture(), question, {"regions": [[[0.25, 0.25, 0.5, 0.5]]]})
        fresh.close()
    after = [metric(server, name, model_name=MODEL) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [12 * 576, 12 * 64]
    assert metric(server, "crop:requests_total", outcome="pruned") == pruned + 12


async def leave_early(client: openai.AsyncOpenAI, scene: TestScene, question: str, number: int) -> bool:
    """Stream an answer; every third client goes away while it is localized or answered."""
    stream = client.chat.completions.create(
        model=MODEL,
        messages=question_about(marked(scene, 1000 + number), question),
        max_tokens=40,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    if number % 3 == 0:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream, timeout=0.02 * (number % 40))
        return False
    chunks = [chunk async for chunk in await stream]
    return any(chunk.choices and chunk.choices[0].finish_reason == "length" for chunk in chunks)


def memory_of(server: Server) -> int:
    """Of all of its processes; shared pages count once in each."""
    leader = psutil.Process(server.process_id)
    return sum(one.memory_info().rss for one in [leader, *leader.children(recursive=True)])


def test_a_hundred_streams_with_a_third_of_the_clients_leaving(server: Server, client: openai.OpenAI) -> None:
    async def all_at_once() -> list[bool]:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key=API_KEY, max_retries=0, timeout=300
        ) as many:
            tasks = [leave_early(many, *LOCAL[n % len(LOCAL)], n) for n in range(100)]
            return await asyncio.gather(*tasks)

    def round_of_streams() -> int:
        """Returns the server's memory afterwards, in bytes."""
        assert sum(asyncio.run(all_at_once())) == 100 - len(range(0, 100, 3))
        deadline = time.monotonic() + 30
        while metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are left in the engine"
            time.sleep(0.1)
        assert metric(server, "vllm:kv_cache_usage_perc") == 0
        return memory_of(server)

    # Caches are full soon, and every process has had its busiest moment once; what leaks goes on growing.
    used = [round_of_streams()]
    while len(used) < 5 and (len(used) < 2 or used[-1] - used[-2] >= 64 << 20):
        used.append(round_of_streams())
    assert used[-1] - used[-2] < 64 << 20, used
    get_text(f"{server.base_url}/health")
    scene, question = LOCAL[0]
    assert found(ask(client, scene.picture(), question))["localizer"]["outcome"] == "region"


def test_many_at_once_get_their_own_regions(client: openai.OpenAI) -> None:
    cases = [(scene, question) for scene, question in LOCAL for _ in range(3)]

    def ask_one(case: tuple[TestScene, str]) -> str:
        return json.dumps(found(ask(client, case[0].picture(), case[1]))["region"])

    with ThreadPoolExecutor(16) as pool:
        regions = list(pool.map(ask_one, cases))
    for scene, question in LOCAL[:4]:
        at = [index for index, case in enumerate(cases) if case == (scene, question)]
        alone = json.dumps(found(ask(client, scene.picture(), question))["region"])
        assert {regions[index] for index in at} == {alone}


def test_without_a_key_nobody_is_asked(server: Server) -> None:
    before = metric(server, "crop:localizations_total")
    stranger = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        ask(stranger, LOCAL[0][0].picture(), LOCAL[0][1])
    assert metric(server, "crop:localizations_total") == before


def test_a_bad_field_is_a_400(client: openai.OpenAI) -> None:
    for crop in ({"localize": "always"}, {"question": ""}, {"question": "x" * 5000}, {"question": 5}):
        with pytest.raises(openai.BadRequestError, match=next(iter(crop))):
            ask(client, LOCAL[0][0].picture(), LOCAL[0][1], crop)


def test_regions_are_boxes_of_cells(client: openai.OpenAI) -> None:
    scene, question = LOCAL[0]
    region = found(ask(client, scene.picture(), question))["region"]
    assert Region.from_grid_cells(*(0, 0, 7, 7)) == Region.whole()
    assert all(8 * side == pytest.approx(round(8 * side), abs=1e-3) for box in region for side in box)
