# SPDX-License-Identifier: Apache-2.0
"""Draws pages with Debian's chromium and says where everything is."""

import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
from PIL import Image

from lab.pages.documents import CODES, Document, make_document
from lab.pages.looks import SPLITS, Look, Split, make_look

HERE = Path(__file__).parent
MOST_ROWS = 40  # in all; a page has room for fewer
_SEEDS = 10_000_000  # of a split: no two show a document twice
_BAR = 42  # pixels: less high they cover each other
ECHARTS = "node_modules/echarts/dist/echarts.min.js"
PixelBox = tuple[float, float, float, float]


@dataclass(frozen=True)
class Letter:
    """A letter and the middle of it, in pixels; whether a word begins with it."""

    letter: str
    x: float
    y: float
    begins: bool


@dataclass(frozen=True)
class Page:
    """A drawn page.

    Attributes:
        document: what it shows; rows that found no room are gone.
        boxes: pixels of what `data-at` names, as far as it is wholly in view.
        letters: in the order of the document, not of the page.
    """

    document: Document
    look: Look
    picture: Image.Image
    boxes: Mapping[str, PixelBox]
    letters: tuple[Letter, ...]


class Drawer:
    """A browser's tab that draws one page after the other."""

    def __init__(self, tab: Any, modules: Path, source: Path) -> None:
        """Take a tab.

        Args:
            modules: the folder in which `npm install` was called.
            source: a file for a page's HTML: a page that is none may load no files.
        """
        self._tab, self._modules, self._source = tab, modules.resolve(), source

    def page(self, seed: int, split: Split) -> Page:
        """The page of a seed.

        Raises:
            FileNotFoundError: it has a chart and ECharts is not installed.
        """
        look = make_look(seed, split)
        chart = look.kind == "chart"
        document = make_document(
            seed + _SEEDS * SPLITS.index(split), look.kind, look.size[1] // _BAR if chart else MOST_ROWS
        )
        if chart and not (self._modules / ECHARTS).exists():
            raise FileNotFoundError(
                f"no {ECHARTS} in {self._modules}: npm install --prefix {self._modules} echarts"
            )
        self._tab.set_viewport_size({"width": look.size[0], "height": look.size[1]})
        self._source.write_text(html_of(document, look, self._modules / ECHARTS), encoding="utf-8")
        self._tab.goto(self._source.as_uri())
        left = self._tab.evaluate(_script("fit"))
        found = self._tab.evaluate(_script("read"))
        picture = Image.open(io.BytesIO(self._tab.screenshot())).convert("RGB")
        rows = [left.get(str(s), len(sheet.rows)) for s, sheet in enumerate(document.sheets)]
        shown = document.with_rows(rows, left.get(CODES, len(document.codes)))
        boxes = {key: (x0, y0, x1, y1) for key, (x0, y0, x1, y1) in found["boxes"].items()}
        return Page(shown, look, picture, boxes, tuple(Letter(*each) for each in found["letters"]))


@contextmanager
def drawer(modules: Path) -> Iterator[Drawer]:
    """A browser, open.

    Raises:
        FileNotFoundError: there is no chromium.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        raise FileNotFoundError("pages are drawn by a browser: apt-get install chromium")
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield Drawer(browser.new_page(), modules, Path(folder) / "page.html")
        finally:
            browser.close()


def html_of(document: Document, look: Look, echarts: Path) -> str:
    """The page's source."""
    sheets = [asdict(sheet) for sheet in document.sheets]
    template = _templates().get_template(f"{look.layout}.html.jinja")
    return template.render(
        document=document, style=look.style, size=look.size, sheets=sheets, echarts=echarts.as_uri()
    )


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(HERE / "layouts")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


@cache
def _script(name: str) -> str:
    lines = (HERE / f"{name}.js").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//"))
