# SPDX-License-Identifier: Apache-2.0
"""The playground in a browser, on a real `vllm serve` with an API key and the engine's localizer."""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from playwright.sync_api import Browser, expect

from lab.evaluation.questions import make_test_set
from tests.browser import REGION_PIXEL, Reader, chromium
from tests.e2e.conftest import API_KEY, MODEL
from tests.tinyvqa import ask, found
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

SCENE = make_test_set(6, seed=3)[0]
QUESTION = next(question for question in SCENE.questions if question.boxes)
LOWER_RIGHT = [0.5, 0.5, 1.0, 1.0]
SCREENSHOT = os.environ.get("CROP_SCREENSHOT")  # where to leave a picture of the page


@pytest.fixture(scope="module")
def server(localizing_server: Server) -> Server:
    return localizing_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    SCENE.picture().save(path)
    return path


@pytest.fixture
def reader(server: Server, browser: Browser) -> Iterator[Reader]:
    """Someone with the right key, whose page does nothing it must not."""
    someone = Reader(browser, server.base_url)
    someone.open(API_KEY)
    expect(someone["server"]).to_contain_text("Model")
    yield someone
    someone.check_quiet()
    someone.context.close()


@pytest.fixture
def api(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=API_KEY, max_retries=0)


def status_of(server: Server, path: str, key: str | None = None, body: Any = None) -> int:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.base_url}{path}", data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_is_open_and_what_it_calls_is_guarded(server: Server) -> None:
    assert status_of(server, "/plugins/crop/") == 200
    size = {"image_size": [64, 64]}
    for key, status in ((None, 401), ("wrong", 401), (API_KEY, 200)):
        assert status_of(server, "/v1/plugins/crop/plan", key, size) == status
        assert status_of(server, "/v1/plugins/crop/settings", key) == status
    assert status_of(server, "/v1/plugins/crop/plan", API_KEY, {"image_size": [0, 1]}) == 400
    # The route takes no field `crop`, and our middleware says so.
    assert status_of(server, "/v1/plugins/crop/plan", API_KEY, {**size, "crop": {}}) == 400


def test_both_answers_with_what_they_cost(reader: Reader, picture: Path, api: openai.OpenAI) -> None:
    reader.prepare(picture, QUESTION.text)
    pruned, full = reader.ask()
    expected = found(ask(api, SCENE.picture(), QUESTION.text))
    (image,) = pruned["images"]
    assert image["region"] == expected["region"]
    assert reader.sent_crop() == {"method": "plc", "pruning_rate": 0.889}
    for side, facts in (("with", pruned), ("without", full)):
        tokens = f"{facts['tokens_after_plc']} of {facts['tokens']}"
        assert reader.fact(side, "image-tokens") == tokens
        assert float(reader.fact(side, "average").partition(" ")[0]) == pytest.approx(
            facts["tokens_avg"], 0.01
        )
        assert reader.fact(side, "first-token").endswith(" ms")
    prompts = [int(reader.fact(side, "prompt-tokens")) for side in ("with", "without")]
    assert prompts[1] - prompts[0] == full["tokens_after_plc"] - pruned["tokens_after_plc"] == 512
    assert " ms" in reader.fact("with", "localizer")
    confidence = float(reader.fact("with", "confidence").removesuffix(" %"))
    assert confidence == pytest.approx(100 * image["localizer"]["confidence"], abs=0.06)
    assert reader.fact("with", "source") == "found by the localizer"
    assert reader.fact("without", "source") == "none: method off"
    assert reader["without"].locator(".answer").inner_text() == QUESTION.answer
    (_, first_ended), (second_began, _) = reader.chat_times()
    assert first_ended <= second_began, "one after the other"


def test_the_region_and_the_tokens_are_drawn(reader: Reader, tmp_path: Path) -> None:
    picture = SCENE.picture()
    picture.putpixel((0, 0), (1, 2, 3))  # nobody has asked about this one
    picture.save(tmp_path / "scene.png")
    reader.prepare(tmp_path / "scene.png", QUESTION.text)
    pruned, _ = reader.ask()
    assert not pruned["images"][0]["localizer"]["cached"]
    ((x0, y0, x1, y1),) = pruned["images"][0]["region"]
    expect(reader["legend"]).to_contain_text("pooled")
    for x, y in ((x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)):
        assert reader.pixel(x, y) == REGION_PIXEL
    outside = reader.pixel(0.93, 0.93)
    reader["show-tokens"].uncheck()
    assert reader.pixel(0.93, 0.93) != outside
    reader["show-tokens"].check()
    assert reader.pixel(0.93, 0.93) == outside
    kept = int(reader["legend"].inner_text().partition("per cell (")[2].partition(")")[0])
    pooled = int(reader["legend"].inner_text().partition("per group (")[2].partition(")")[0])
    assert kept + pooled == pruned["tokens_after_plc"]
    if SCREENSHOT:
        reader.screenshot(SCREENSHOT)


def test_methods_and_the_slider_change_the_plan_at_once(reader: Reader, picture: Path) -> None:
    reader.prepare(picture, QUESTION.text)
    options = reader["method"].locator("option").evaluate_all("all => all.map(option => option.value)")
    assert options == ["plc", "ilp", "plc+ilp"]
    expect(reader["plan-text"]).to_contain_text("Without a region: 576 tokens, all kept.")
    reader.ask()
    expect(reader["plan-text"]).to_contain_text("576 tokens become 64")
    reader["rate"].fill("0.5")
    expect(reader["rate-shown"]).to_have_text("50 %")
    expect(reader["plan-text"]).to_contain_text("576 tokens become 288")
    reader["method"].select_option("plc+ilp")
    expect(reader["plan-text"]).to_contain_text("evicted from layer 1 on")
    expect(reader["legend"]).to_contain_text("evicted: seen below layer 1")
    pruned, _ = reader.ask()
    assert reader.sent_crop() == {"method": "plc+ilp", "pruning_rate": 0.5}
    assert pruned["tokens_avg"] == pytest.approx(288, abs=1)
    assert pruned["tokens_after_plc"] > 288
    assert reader.fact("with", "asked") == "method plc+ilp, 50 % pruned"
    reader["method"].select_option("plc")
    reader["most"].fill("40")
    expect(reader["rate"]).to_be_disabled()
    expect(reader["plan-text"]).to_contain_text("576 tokens become 40")
    pruned, _ = reader.ask()
    assert reader.sent_crop() == {"method": "plc", "max_tokens": 40}
    assert pruned["tokens_after_plc"] == 40
    assert reader.fact("with", "asked") == "method plc, at most 40 tokens"
    reader["most"].fill("")
    expect(reader["rate"]).to_be_enabled()
    expect(reader["plan-text"]).to_contain_text("576 tokens become 288")


def test_a_box_by_mouse_overrides_the_region_until_it_is_cleared(
    reader: Reader, picture: Path, api: openai.OpenAI
) -> None:
    reader.prepare(picture, QUESTION.text)
    first, _ = reader.ask()
    mouse = reader.page.mouse
    mouse.move(*reader.place(0.501, 0.501))
    mouse.down()
    mouse.move(*reader.place(0.7, 0.8), steps=4)
    mouse.move(*reader.place(0.9, 0.95), steps=4)
    mouse.up()
    expect(reader["plan-text"]).not_to_contain_text("55 pooled")
    second, _ = reader.ask()
    (box,) = second["images"][0]["region"]
    assert box == pytest.approx([0.5, 0.5, 0.9, 0.95], abs=0.01)
    assert box != first["images"][0]["region"][0]
    assert reader.sent_crop()["regions"] == [box]
    assert reader.fact("with", "source") == "your box"
    assert reader.fact("with", "localizer") == "not asked"
    assert reader.pixel(box[0], 0.7) == REGION_PIXEL
    response = ask(api, SCENE.picture(), QUESTION.text, {"regions": [box], "pruning_rate": 0.889})
    assert reader["with"].locator(".answer").inner_text() == response.parse().choices[0].message.content
    reader["clear"].click()
    expect(reader["clear"]).to_be_disabled()
    third, _ = reader.ask()
    assert third["images"][0]["region"] == first["images"][0]["region"]
    assert third["images"][0]["source"] == "engine"


def test_everything_works_without_a_mouse(server: Server, browser: Browser, picture: Path) -> None:
    reader = Reader(browser, server.base_url)
    page = reader.page
    page.goto(f"{server.base_url}/plugins/crop/")
    reader.tab_to("key")
    page.keyboard.type(API_KEY)
    reader.tab_to("file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    reader.tab_to("question")
    page.keyboard.type(QUESTION.text)
    page.keyboard.press("Enter")
    first, _ = reader.answers()
    for side, percent in zip(("left", "top", "right", "bottom"), LOWER_RIGHT, strict=True):
        reader.tab_to(f"box-{side}")
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        page.keyboard.type(str(round(100 * percent)))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    second, _ = reader.answers()
    assert second["images"][0]["region"] == [LOWER_RIGHT] != first["images"][0]["region"]
    reader.tab_to("clear")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "box-left"
    reader.tab_to("ask")
    page.keyboard.press("Enter")
    third, _ = reader.answers()
    assert third["images"][0]["region"] == first["images"][0]["region"]
    reader.check_quiet()
    reader.context.close()


def test_on_a_phone_in_the_dark_nothing_scrolls_sideways(
    server: Server, browser: Browser, picture: Path
) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
    reader = Reader(browser, server.base_url, is_mobile=True, device_scale_factor=2, **phone)
    reader.open(API_KEY)
    assert reader.overflow() <= 0
    reader.prepare(picture, QUESTION.text)
    reader["finger"].tap()
    places = [reader.place(*at) for at in ((0.2, 0.2), (0.4, 0.3), (0.6, 0.7))]
    touch = reader.context.new_cdp_session(reader.page)
    for kind, at in zip(("touchStart", "touchMove", "touchMove"), places, strict=True):
        points = [{"x": at[0], "y": at[1]}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    facts, _ = reader.ask()
    assert facts["images"][0]["region"][0] == pytest.approx([0.2, 0.2, 0.6, 0.7], abs=0.02)
    assert reader.overflow() <= 0
    assert reader.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 29)"
    reader.check_quiet()
    reader.context.close()


def test_an_image_can_be_dropped_or_pasted(reader: Reader, picture: Path) -> None:
    script = """([type, base64]) => {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "scene.png", { type: "image/png" }));
        const event = type === "drop"
            ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
        document.getElementById("stage").dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        reader.open(API_KEY)
        expect(reader["server"]).to_contain_text("Model")
        expect(reader["canvas"]).to_be_hidden()
        reader.page.evaluate(script, [kind, base64.b64encode(picture.read_bytes()).decode()])
        expect(reader["canvas"]).to_be_visible()
        expect(reader["overlay-text"]).to_contain_text("24 \u00d7 24")


def test_what_is_missing_is_said(reader: Reader, picture: Path, tmp_path: Path) -> None:
    expect(reader["server"]).to_have_text(f"Model {MODEL}")
    reader["ask"].click()
    expect(reader["problem"]).to_have_text("Choose an image first.")
    text = tmp_path / "letter.txt"
    text.write_text("no image")
    reader["file"].set_input_files(text)
    expect(reader["problem"]).to_contain_text("not an image")
    reader["file"].set_input_files(picture)
    reader["ask"].click()
    expect(reader["problem"]).to_have_text("Type a question first.")
    expect(reader["question"]).to_be_focused()
    reader["question"].fill(QUESTION.text)
    reader["box-left"].fill("100")
    reader["ask"].click()
    expect(reader["problem"]).to_contain_text("Right must be more than left.")
    assert reader.chats == []


def test_a_wrong_key_is_said_and_a_right_one_mends_it(
    server: Server, browser: Browser, picture: Path
) -> None:
    reader = Reader(browser, server.base_url)
    reader.page.goto(f"{server.base_url}/plugins/crop/")
    expect(reader["problem"]).to_have_text("This server asks for an API key.")
    reader.check_quiet()
    for wrong in ("wrong", "schlüssel", "ключ"):
        reader["key"].fill(wrong)
        reader["key"].blur()
        expect(reader["problem"]).to_contain_text("key")
        expect(reader["key"]).to_have_attribute("aria-invalid", "true")
        reader["file"].set_input_files(picture)
        reader["question"].fill(QUESTION.text)
        reader["ask"].click()
        expect(reader["problem"]).to_contain_text("key")
    reader["key"].fill(API_KEY)
    reader["ask"].click()
    reader.answers()
    assert all("401" in complaint for complaint in reader.complaints)
    reader.context.close()


def test_refusals_absence_and_stopping_are_said(server: Server, browser: Browser, picture: Path) -> None:
    reader = Reader(browser, server.base_url)
    reader.open(API_KEY)
    reader.prepare(picture, QUESTION.text)
    reader["method"].select_option("ilp")
    reader["rate"].fill("0.98")
    reader["box-right"].fill("50")
    refusal = "needs a pruning_rate of at most"
    expect(reader["plan-text"]).to_contain_text(refusal)
    reader["ask"].click()
    expect(reader["problem"]).to_contain_text(refusal)
    reader.context.set_offline(True)
    reader["ask"].click()
    expect(reader["problem"]).to_have_text("The server cannot be reached. Is it running?")
    reader.context.set_offline(False)
    reader.page.route("**/chat/completions", lambda route: None)
    reader["ask"].click()
    reader["stop"].click()
    expect(reader["status"]).to_have_text("Stopped.")
    expect(reader["ask"]).to_be_focused()
    reader.page.unroute("**/chat/completions")
    reader["rate"].fill("0.5")
    reader.ask()
    reader.context.close()
