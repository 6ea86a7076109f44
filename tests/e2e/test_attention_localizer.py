# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` that finds regions where the model looks, on two API server processes."""

import base64
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from playwright.sync_api import expect

from lab.evaluation.questions import make_test_set
from lab.evaluation.regions import cells_of
from tests.browser import Reader, chromium
from tests.e2e.conftest import MODEL, metric
from tests.pictures import noise_image
from tests.tinyvqa import ask, found
from vllm_crop.localizers.decision import FALLBACKS
from vllm_crop.measuring.server import Server
from vllm_crop.planning.geometry import Box, Region, TokenGrid

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SCENES = make_test_set(6, seed=31)
LOCAL = [(scene, q) for scene in SCENES for q in scene.questions if q.boxes]
GLOBAL = [(scene, q) for scene in SCENES for q in scene.questions if not q.boxes]
TOKENS = TokenGrid(24, 24)


@pytest.fixture
def server(checked_server: Server) -> Server:
    return checked_server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)


def marked(picture: Image.Image, number: int) -> Image.Image:
    """A picture that no cache has seen."""
    picture.putpixel((0, 0), (number % 256, number // 256, 31))
    return picture


def covers(image: Any, question: Any) -> float:
    """How much of what a question needs its region has."""
    region = Region(tuple(Box(*box) for box in image["region"]))
    needed = TOKENS.mask(question.region(8))
    return float((needed & TOKENS.mask(region)).sum() / needed.sum())


def test_the_question_in_readme_is_answered_as_it_says(server: Server) -> None:
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"```bash\n(curl -si .*?)```", readme, re.DOTALL)
    said = re.search(
        r"\(docs/scene\.png\); the answer is (\d), from (\d+) of its (\d+) visual tokens", readme
    )
    assert command
    assert said
    here = command[1].replace("http://localhost:8000", server.base_url).replace('"tinyvqa"', f'"{MODEL}"')
    asked = subprocess.run(["bash", "-c", here], cwd=ROOT, capture_output=True, text=True, check=True)
    headers, _, body = asked.stdout.partition("\n\n")
    answer, most, whole = said.groups()
    assert json.loads(body)["choices"][0]["message"]["content"] == answer
    assert f'"tokens":{whole},"tokens_after_plc":{most},' in headers


def test_the_region_is_where_the_answer_is(client: openai.OpenAI) -> None:
    covered, right = [], 0
    for scene, question in LOCAL:
        response = ask(client, scene.picture(), question.text)
        image = found(response)
        assert (image["source"], image["localizer"]["outcome"]) == ("attention", "region"), question.text
        assert image["tokens_after_plc"] == 64
        covered.append(covers(image, question))
        right += response.parse().choices[0].message.content.strip() == question.answer
    assert sum(covered) / len(covered) > 0.9
    assert min(covered) > 0.4
    assert right >= 0.8 * len(LOCAL)


def test_a_flat_map_is_served_whole_and_counted(server: Server, client: openai.OpenAI) -> None:
    before = metric(server, "crop:localizations_total", outcome="low_confidence")
    whole = 0
    for scene, question in GLOBAL:
        image = found(ask(client, scene.picture(), question.text))
        whole += image["localizer"]["outcome"] == "low_confidence"
        assert (image["region"] is None) == (image["localizer"]["outcome"] == "low_confidence")
    assert whole >= 0.8 * len(GLOBAL)
    assert metric(server, "crop:localizations_total", outcome="low_confidence") == before + whole


@pytest.mark.parametrize("method", ["plc", "ilp", "plc+ilp"])
def test_every_method_takes_the_region(client: openai.OpenAI, method: str) -> None:
    scene, question = LOCAL[0]
    image = found(ask(client, marked(scene.picture(), 1), question.text, {"method": method}))
    assert covers(image, question) > 0.5
    assert image["tokens_avg"] < 64.5


def test_many_at_once_get_their_own_regions_beside_others(server: Server, client: openai.OpenAI) -> None:
    alone = [found(ask(client, scene.picture(), q.text))["region"] for scene, q in LOCAL]

    def one(number: int) -> Any:
        scene, question = LOCAL[number % len(LOCAL)]
        if number % 3 == 2:  # clients' own log-probabilities are theirs
            response = ask(
                client, scene.picture(), question.text, {"method": "off"}, logprobs=True, top_logprobs=5
            )
            first = response.parse().choices[0].logprobs.content[0]
            assert len(first.top_logprobs) == 5
            assert all(-100 < top.logprob <= 0 for top in first.top_logprobs)
            return None
        return found(ask(client, marked(scene.picture(), number), question.text))

    with ThreadPoolExecutor(24) as pool:
        images = list(pool.map(one, range(3 * len(LOCAL))))
    for number, image in enumerate(images):
        if image is not None:
            wanted = alone[number % len(LOCAL)]
            assert image["region"] == [pytest.approx(box, abs=0.13) for box in wanted], number
    assert sum(
        metric(server, "crop:localizations_total", outcome=fallback) for fallback in FALLBACKS
    ) == metric(server, "crop:localizations_total", outcome="low_confidence")


def test_the_same_question_is_not_asked_again_and_salts_keep_apart(client: openai.OpenAI) -> None:
    scene, question = LOCAL[1]
    picture = marked(scene.picture(), 700)
    cached = [
        found(ask(client, picture, question.text, body=body))["localizer"]["cached"]
        for body in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "a"})
    ]
    assert cached[0] is False
    assert cached[2] is False
    # Two API processes have a cache each.
    again = [found(ask(client, picture, question.text))["localizer"]["cached"] for _ in range(12)]
    assert any(again)


def test_odd_pictures_are_answered(client: openai.OpenAI) -> None:
    for size in ((28, 28), (1200, 40), (40, 1200), (620, 480)):
        response = ask(client, noise_image(5, *size), LOCAL[0][1].text)
        assert response.parse().choices[0].message.content is not None
        assert found(response)["localizer"]["outcome"] in ("region", "low_confidence", "not_possible")


def test_many_images_and_none(server: Server, client: openai.OpenAI) -> None:
    few = min(8, len(LOCAL))  # as many as the server takes
    pictures = [marked(LOCAL[index][0].picture(), 800 + index) for index in range(few)]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in map(_url, pictures)]
    messages: Any = [{"role": "user", "content": [*content, {"type": "text", "text": LOCAL[0][1].text}]}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert answer.choices[0].message.content is not None
    plain: Any = [{"role": "user", "content": "how many?"}]
    assert client.chat.completions.create(model=MODEL, messages=plain, max_tokens=2).choices


def _url(picture: Image.Image) -> str:
    from vllm_crop.client import data_url

    return data_url(picture)


def test_nothing_went_wrong(server: Server) -> None:
    log = server.log_path.read_text()
    assert "Traceback" not in log
    assert "\nERROR" not in log
    assert metric(server, "crop:localizations_total", outcome="unreadable") == 0


def test_the_facts_say_where_the_model_looked(client: openai.OpenAI) -> None:
    scene, question = next((scene, q) for scene, q in LOCAL if q.family == "read")
    image = found(ask(client, marked(scene.picture(), 901), question.text))
    said = image["localizer"]
    heat = said["heat"]
    values = np.frombuffer(base64.b64decode(heat["values"]), dtype=np.uint8)
    assert values.max() == 255
    assert heat["window"] == [0, 0, 1, 1]
    hottest = divmod(int(values.argmax()), heat["cols"])
    assert hottest in {divmod(cell, 8) for cell in cells_of(question.region(8), 8)}
    assert said["peak"] == pytest.approx(255 / values.sum(), rel=0.1)
    assert 0 < said["spread"] < 0.8
    assert "reason" not in said
    asked = [found(ask(client, s.picture(), q.text)) for s, q in GLOBAL]
    unsure = [image for image in asked if image["localizer"]["outcome"] == "low_confidence"]
    assert unsure
    for image in unsure:
        assert image["localizer"]["reason"].endswith("is less than whole_below, 0.3")
        assert image["localizer"]["spread"] > said["spread"]
        assert image["tokens_avg"] == image["tokens"]


def test_the_page_shows_where_the_model_looked(server: Server, tmp_path: Path) -> None:
    scene, question = next((scene, q) for scene, q in LOCAL if q.family == "read")
    picture = tmp_path / "scene.png"
    marked(scene.picture(), 902).save(picture)
    with chromium() as browser:
        reader = Reader(browser, server.base_url)
        reader.open("")
        reader.prepare(picture, question.text)
        expect(reader["heat-choice"]).to_be_hidden()
        facts, _ = reader.ask()
        assert facts["images"][0]["source"] == "attention"
        assert "hottest cell" in reader.fact("with", "looked")
        expect(reader["heat-choice"]).to_be_visible()
        reader["show-tokens"].uncheck()
        ((x0, y0, x1, y1),) = [[side / 8 for side in _cell_box(question)]]
        middle = [(x0 + x1) / 2, (y0 + y1) / 2]
        plain, elsewhere = colour_at(reader, *middle), colour_at(reader, 0.999, 0.999)
        reader["show-heat"].check()
        warm = colour_at(reader, *middle)
        assert abs(warm[0] - 255) + abs(warm[1] - 140) + warm[2] < 200  # orange
        assert warm != plain
        assert max(abs(a - b) for a, b in zip(colour_at(reader, 0.999, 0.999), elsewhere, strict=True)) < 60
        reader["show-heat"].uncheck()
        assert colour_at(reader, *middle) == plain
        another = tmp_path / "another.png"
        noise_image(903).save(another)
        reader["file"].set_input_files(another)  # the map was of the picture before
        expect(reader["heat-choice"]).to_be_hidden()
        reader.check_quiet()


def _cell_box(question: Any) -> list[int]:
    row, col = question.decisive[0]
    return [col, row, col + 1, row + 1]


def colour_at(reader: Reader, x: float, y: float) -> list[int]:
    """Red, green and blue of the canvas at a place in fractions of it."""
    script = """([x, y]) => {
        const canvas = document.getElementById("canvas");
        const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        pixel.drawImage(canvas, -Math.floor(x * canvas.width), -Math.floor(y * canvas.height));
        return [...pixel.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    }"""
    return list(reader.page.evaluate(script, [x, y]))
