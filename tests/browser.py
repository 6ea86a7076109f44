# SPDX-License-Identifier: Apache-2.0
"""A reader in front of the playground: Debian's chromium, driven by Playwright."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

try:
    from playwright.sync_api import Browser, Locator, Page, Request, expect, sync_playwright
except ImportError as error:
    raise ImportError("the playground's tests need playwright: pip install -e '.[dev]'") from error

ANSWER_MS = 120_000  # on a busy machine, the first compiled step included
REGION_PIXEL = [255, 45, 120, 255]
PIECE_PIXEL = [0, 190, 220, 255]


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser that is installed; Playwright would download its own."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("the playground's tests need a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """One tab. Notes everything a page must not do; `check_quiet` fails if it did."""

    def __init__(self, browser: Browser, base_url: str, **options: Any) -> None:
        self.base_url = base_url
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.chats: list[Request] = []
        self.page.on("console", self._hear)
        # Playwright waits for file dialogs only once someone listens, and does not wait for that itself.
        self.page.on("filechooser", lambda chooser: None)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on(
            "requestfailed",
            lambda request: self.complaints.append(f"failed: {request.url} {request.failure}"),
        )
        self.page.on("request", self._sent)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _sent(self, request: Request) -> None:
        if not request.url.startswith((self.base_url, "data:", "blob:")):
            self.complaints.append(f"another origin: {request.url}")
        if request.url.endswith("/chat/completions"):
            self.chats.append(request)

    def check_quiet(self) -> None:
        """No error on the console, no failed request, no other origin."""
        if self.complaints:
            pytest.fail("\n".join(self.complaints))

    def open(self, key: str) -> None:
        """Open the page and type a key; it is connected afterwards if the key is right."""
        self.page.goto(f"{self.base_url}/plugins/crop/")
        self["key"].fill(key)
        self["key"].blur()

    def __getitem__(self, element_id: str) -> Locator:
        return self.page.locator(f"#{element_id}")

    def prepare(self, picture: Path, question: str) -> None:
        """Choose an image and type a question."""
        expect(self["server"]).to_contain_text("Model")
        self["file"].set_input_files(picture)
        self["question"].fill(question)

    def ask(self) -> list[Any]:
        """Press Ask; see `answers`."""
        self["ask"].click()
        return self.answers()

    def answers(self) -> list[Any]:
        """Wait for both answers; the facts headers that came with them."""
        # The status of an earlier question was overwritten while the click or key was handled.
        expect(self["status"]).to_contain_text("Answered", timeout=ANSWER_MS)
        expect(self["ask"]).to_have_attribute("aria-disabled", "false")
        assert self["problem"].inner_text() == ""
        headers = [request.response().headers for request in self.chats[-2:]]  # type: ignore[union-attr]
        return [json.loads(each["x-crop-facts"]) for each in headers]

    def chat_times(self) -> list[list[float]]:
        """Beginning and end of every question's requests, in milliseconds, by the browser's clock."""
        script = """() => performance.getEntriesByType("resource")
            .filter((entry) => entry.name.endsWith("/chat/completions"))
            .map((entry) => [entry.startTime, entry.responseEnd])"""
        return list(self.page.evaluate(script))

    def fact(self, side: str, name: str) -> str:
        """A cell of the table of `with` or `without`."""
        return self[side].locator(f'[data-fact="{name}"]').inner_text()

    def sent_crop(self) -> Any:
        """The field `crop` of the last question's first request."""
        return self.chats[-2].post_data_json["crop"]

    def pixel(self, x: float, y: float) -> list[int]:
        """The canvas at a place given in fractions of the image."""
        script = """(canvas, [x, y]) => {
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
            copy.drawImage(canvas, 0, 0);
            const place = [Math.round(x * canvas.width), Math.round(y * canvas.height)];
            return [...copy.getImageData(...place, 1, 1).data];
        }"""
        return list(self["canvas"].evaluate(script, [x, y]))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where in the window fractions of the image are."""
        self["canvas"].scroll_into_view_if_needed()
        bounds = self["canvas"].bounding_box()
        assert bounds is not None
        return bounds["x"] + x * bounds["width"], bounds["y"] + y * bounds["height"]

    def tab_to(self, element_id: str) -> None:
        """Press Tab until an element has the focus, as someone without a mouse does."""
        for _ in range(40):
            if self.page.evaluate("document.activeElement.id") == element_id:
                return
            self.page.keyboard.press("Tab")
        pytest.fail(f"the Tab key never reaches #{element_id}")

    def screenshot(self, path: str) -> None:
        """The whole page as a PNG; a little less colour makes a noisy picture half as large."""
        self.page.mouse.move(0, 0)
        self.page.screenshot(path=path, full_page=True)
        ImageOps.posterize(Image.open(path).convert("RGB"), bits=6).save(path, optimize=True)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))
