# SPDX-License-Identifier: Apache-2.0
"""Pages as a real browser draws them: what boxes hold is what questions are about."""

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lab.pages.asking import FAMILIES, LOCAL, ask, cells_of
from lab.pages.browser import Drawer, Page, drawer
from lab.pages.looks import FONTS, LAYOUTS, SPLITS, Split
from lab.pages.questions import write_questions
from lab.pages.store import read_pages, write_page
from lab.pages.tokenizer import make_tokenizer
from lab.pages.training.batches import Pages, Steps
from lab.pages.training.letters import IGNORED
from lab.pages.training.names import name_labels
from lab.pages.training.phases import PHASES
from lab.pages.training.trainer import Trainer
from lab.tinyvqa.checkpoint import TOKEN
from lab.tinyvqa.training.forward import image_patches, vision_features


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawer]:
    with drawer(tmp_path_factory.mktemp("modules")) as opened:
        yield opened


def drawn(browser: Drawer, split: Split, count: int) -> list[Page]:
    pages: list[Page] = []
    for seed in range(10 * count):
        with suppress(FileNotFoundError):  # a chart, where ECharts is not installed
            pages.append(browser.page(seed, split))
        if len(pages) == count:
            break
    return pages


def said(page: Page, box: tuple[float, float, float, float]) -> str:
    x0, y0, x1, y1 = box
    inside = [each for each in page.letters if x0 <= each.x <= x1 and y0 <= each.y <= y1]
    return "".join(each.letter for each in inside).lower()


@pytest.fixture(scope="module", params=SPLITS)
def pages(browser: Drawer, request: pytest.FixtureRequest) -> list[Page]:
    return drawn(browser, request.param, 8)


def test_boxes_hold_what_questions_are_about(pages: list[Page]) -> None:
    asked = 0
    for page in pages:
        assert page.picture.size == page.look.size
        for family in LOCAL:
            question = ask(page, family, random.Random(0))
            if question is None:
                continue
            asked += 1
            words = [said(page, box) for box in question.boxes]
            for word in words:
                assert word, (question, words)
            named = question.text.replace(" ", "")
            if family in ("read", "twin"):
                name, value, column = words[:3]
                assert value == question.answer.replace(" ", "")
                assert name in named
                assert column in named
            elif family == "compare":
                rows = (words[0], words[3])
                assert question.answer.replace(" ", "") in rows
                assert all(name in named for name in rows)
                values = [float(word.replace(":", ".")) for word in (words[1], words[4])]
                assert rows[values[0] < values[1]] == question.answer.replace(" ", "")
            else:
                assert words[1] == words[3]  # the code, in its cell and in the list
                assert words[4] == question.answer
    assert asked > len(pages)


def test_all_rows_that_are_counted_are_in_view(pages: list[Page]) -> None:
    for page in pages:
        for s, sheet in enumerate(page.document.sheets):
            for r, (name, _) in enumerate(sheet.rows):
                if f"{s}.{r}.n" in page.boxes:
                    assert said(page, page.boxes[f"{s}.{r}.n"]) == name.replace(" ", "").lower()
            missing = [r for r in range(len(sheet.rows)) if f"{s}.{r}.n" not in page.boxes]
            assert len(missing) <= 1, page.look  # a last row stays whatever the page has room for


def test_splits_share_no_layout_no_font_and_no_document(browser: Drawer) -> None:
    layouts = [{name for name, _ in LAYOUTS[split]} for split in SPLITS]
    fonts = [set(FONTS[split]) for split in SPLITS]
    for parts in (layouts, fonts):
        assert sum(map(len, parts)) == len(set().union(*parts))
    headings = [{page.document.heading for page in drawn(browser, split, 4)} for split in SPLITS]
    assert sum(map(len, headings)) == len(set().union(*headings))


def test_same_seed_same_page(browser: Drawer) -> None:
    first, again = (browser.page(3, "dev") for _ in range(2))
    assert first.document == again.document
    assert first.boxes == again.boxes
    assert first.picture.tobytes() == again.picture.tobytes()


def test_kept_and_read_again(browser: Drawer, tmp_path: Path) -> None:
    pages = drawn(browser, "dev", 24)
    for index, page in enumerate(pages):
        write_page(page, tmp_path, f"{index}.png")
    for page, kept in zip(pages, read_pages(tmp_path), strict=True):
        assert (kept.document, kept.look) == (page.document, page.look)
        assert kept.picture.convert("RGB").tobytes() == page.picture.tobytes()
        assert ask(kept, "read", random.Random(1)) is not None or ask(page, "read", random.Random(1)) is None
    lines = [json.loads(line) for line in write_questions(tmp_path, 3).read_text().splitlines()]
    assert {family: sum(line["family"] == family for line in lines) for family in FAMILIES} == dict.fromkeys(
        FAMILIES, 3
    )
    for line in lines:
        assert bool(line["boxes"]) == (line["family"] in LOCAL)
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in line["boxes"])
    with pytest.raises(ValueError, match="too few pages"):
        write_questions(tmp_path, 3000)


def test_tokens_of_values_know_what_their_row_and_column_are_called(browser: Drawer) -> None:
    """Each letter of a value is in a token of that lesson, whose ids spell the names; others have none."""
    tokenizer = make_tokenizer()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    taught = 0
    for page in drawn(browser, "train", 6):
        size = page.look.size
        rows, cols = size[1] // TOKEN, size[0] // TOKEN
        labels = name_labels(page, rows, cols, (1.0, 1.0), encode)
        at = {}
        for cell in cells_of(page):
            x0, y0, x1, y1 = cell.boxes[1]
            inside = [one for one in page.letters if x0 <= one.x <= x1 and y0 <= one.y <= y1]
            for row, col in {(int(one.y // TOKEN), int(one.x // TOKEN)) for one in inside}:
                if row < rows and col < cols:
                    at.setdefault((row, col), []).append(cell)
        for row, col in itertools.product(range(rows), range(cols)):
            spelled = [
                tokenizer.decode([one for one in name if one != IGNORED]).strip()
                for name in labels[row, col].tolist()
            ]
            named = {
                (
                    page.document.sheets[cell.sheet].rows[cell.row][0].lower(),
                    page.document.sheets[cell.sheet].columns[cell.column].name,
                )
                for cell in at.get((row, col), [])
            }
            if named:
                taught += 1
                assert tuple(spelled) in named
            elif not page.document.codes:
                assert spelled == ["", ""]
    assert taught > 50


def test_a_tower_that_stands_still_is_asked_once(browser: Drawer, tmp_path: Path) -> None:
    """What it says of a page is kept for the phase, and is what it would say; its weights do not move."""
    for index, page in enumerate(drawn(browser, "train", 2)):
        write_page(page, tmp_path, f"{index}.png")
    trainer = Trainer(tmp_path, tmp_path / "model", "cpu", batch_scale=0.05, compiled=False)
    trainer.phase = next(at for at, phase in enumerate(PHASES) if not phase.tower)
    before = trainer.model.model.visual.state_dict()["patch_embed.proj.weight"].clone()
    for _ in range(4):
        trainer.train_step()
    assert torch.equal(trainer.model.model.visual.state_dict()["patch_embed.proj.weight"], before)
    assert 1 <= len(trainer._seen) <= 2
    steps = Steps(trainer.pages, PHASES[trainer.phase], seed=1, batch_scale=0.05)
    batch = steps[0]
    rows, cols = batch.images.shape[1] // TOKEN, batch.images.shape[2] // TOKEN
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        known = trainer._known_features(batch, rows, cols)
        visual = trainer.model.model.visual
        anew = vision_features(visual, image_patches(batch.images), rows, cols)
    assert torch.allclose(known.float(), anew.float(), atol=0.05, rtol=0.05)


def test_a_whole_curriculum_within_seconds(browser: Drawer, tmp_path: Path) -> None:
    """Every phase has its share; batches made ahead by another process are those made here."""
    for index, page in enumerate(drawn(browser, "train", 3)):
        write_page(page, tmp_path, f"{index}.png")
    trainer = Trainer(
        tmp_path, tmp_path / "model", "cpu", batch_scale=0.05, workers=1, within=0.05, compiled=False
    )
    trainer.run(minutes=5)
    assert trainer.phase == len(PHASES)
    assert (tmp_path / "model" / "checkpoint" / "model.safetensors").exists()
    steps = Steps(Pages(tmp_path, trainer.tokenizer), PHASES[-1], seed=1, batch_scale=0.05)
    for here, ahead in zip(range(7, 9), steps.ahead(7, workers=1), strict=False):
        assert torch.equal(steps[here].images, ahead.images)
        assert torch.equal(steps[here].questions, ahead.questions)
