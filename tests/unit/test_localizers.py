# SPDX-License-Identifier: Apache-2.0
"""Localizers: what answers mean, what is made of them, which question an image has, and asking once."""

import asyncio
import itertools
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tests.unit.strategies import boxes
from vllm_crop.families.qwen_vl import Qwen3VLGeometry, SmartResize
from vllm_crop.families.view_size import size_for_tokens
from vllm_crop.frontend.shared import SharedAnswers
from vllm_crop.localizers.base import LocalizerAnswer, UnreadableAnswerError
from vllm_crop.localizers.decision import settle
from vllm_crop.localizers.dialects import DIALECTS, WHOLE, read_cells, read_pixels, read_thousandths
from vllm_crop.localizers.questions import LONGEST_QUESTION, normalised, questions_of
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture, as_picture, shrink
from vllm_crop.planning.geometry import Box, Region, TokenGrid

CELLS = "".join(map(str, range(8)))


def test_the_regex_allows_every_legal_box_and_nothing_else() -> None:
    regex = re.compile(DIALECTS["cells"].regex)
    for x0, y0, x1, y1 in itertools.product(CELLS, repeat=4):
        legal = x0 <= x1 and y0 <= y1
        assert bool(regex.fullmatch(x0 + y0 + x1 + y1)) == legal
        if legal:
            assert read_cells(x0 + y0 + x1 + y1) == Region.from_grid_cells(int(x0), int(y0), int(x1), int(y1))
    assert regex.fullmatch(WHOLE)
    assert regex.fullmatch("23350077")
    for wrong in ("", "233", "23353", "2335 0077", "whole2335", "8000", "233500772335"):
        assert not regex.fullmatch(wrong)


def test_two_boxes_of_cells_and_the_whole_image() -> None:
    two = read_cells(" 00112335\n")
    assert two is not None
    assert two.as_lists() == [[0, 0, 0.25, 0.25], [0.25, 0.375, 0.5, 0.75]]
    assert read_cells("whole") is None


@pytest.mark.parametrize("said", ["", "WHOLE", "the red one", "5233", "2335 ", "23358", "٢٣٣٥", "9" * 10**6])
def test_what_is_no_box_of_cells_cannot_be_read(said: str) -> None:
    if said == "2335 ":
        assert read_cells(said) is not None  # spaces around it are nothing
        return
    with pytest.raises(UnreadableAnswerError):
        read_cells(said)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[10, 20, 110, 220]", [[0.05, 0.05, 0.55, 0.55]]),
        ('{"bbox_2d": [10, 20, 110, 220]}', [[0.05, 0.05, 0.55, 0.55]]),
        ('```json\n[{"bbox_2d": [0, 0, 200, 400], "label": "a sign"}]\n```', [[0, 0, 1, 1]]),
        ("[[0, 0, 100, 100], [100, 200, 205, 401]]", [[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]]),
        ("[]", None),
    ],
)
def test_json_boxes_are_fractions_of_the_image_shown(said: str, expected: Any) -> None:
    region = read_pixels(said, (200, 400))
    assert (region and region.as_lists()) == expected


@pytest.mark.parametrize(
    "said",
    [
        "I think it is at the top",
        "[1, 2, 3]",
        '[{"label": "no box"}]',
        "[10, 10, 10, 50]",
        "[300, 300, 400, 500]",
        "[NaN, 0, 1, 1]",
        "[true, 0, 1, 1]",
        '["0", "0", "9", "9"]',
        "null",
        "[" * 2000,
        str([[0, 0, 9, 9]] * 17),
        "[0, 0, 1" + "0" * 5000 + ", 1]",
    ],
)
def test_what_is_no_json_box_cannot_be_read(said: str) -> None:
    with pytest.raises(UnreadableAnswerError):
        read_pixels(said, (200, 400))


def test_thousandths_do_not_depend_on_the_image() -> None:
    region = read_thousandths("[250, 500, 500, 1000]", (77, 13))
    assert region is not None
    assert region.as_lists() == [[0.25, 0.5, 0.5, 1.0]]


@pytest.mark.parametrize("name", ["pixels", "thousandths"])
def test_the_json_regex_allows_what_can_be_read(name: str) -> None:
    regex = re.compile(DIALECTS[name].regex)
    one, two = '{"bbox_2d": [1, 2, 30, 400]}', '{"bbox_2d": [5, 6, 7, 8]}'
    for said in ("[]", f"[{one}]", f"[{one}, {two}]"):
        assert regex.fullmatch(said)
        DIALECTS[name].read(said, (1000, 1000))
    assert not regex.fullmatch("[1, 2, 3, 4]")


MEASURE = """
import resource
from PIL import Image
from vllm_crop.localizers.thumbnails import not_huge, shrink
image = Image.new("RGB", (13000, 13000), "red")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert shrink(image, (112, 112)).getpixel((5, 5)) == (255, 0, 0)
assert not_huge(image).size == (1414, 1414)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_thumbnails_of_a_huge_picture_take_little_memory_of_their_own() -> None:
    """169 megapixels are 507 MB; they came as half a megabyte."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def located(confidence: float | None, box: Box | None = None) -> LocalizerAnswer:
    return LocalizerAnswer(Region((box or Box(0.25, 0.25, 0.5, 0.5),)), confidence)


def test_the_thresholds_decide_between_region_wider_region_and_whole_image() -> None:
    config = LocalizerConfig(kind="engine", whole_below=0.3, widen_below=0.6, widen_by=0.125)
    assert settle(located(0.29), config) == (None, "low_confidence")
    region, outcome = settle(located(0.3), config)
    assert (region and region.as_lists(), outcome) == ([[0.125, 0.125, 0.625, 0.625]], "widened")
    assert settle(located(0.6), config) == (located(0.6).region, "region")
    assert settle(located(None), config) == (located(None).region, "region")
    assert settle(LocalizerAnswer(None, 0.01), config) == (None, "global")


@given(box=boxes(), area=st.integers(0, 100), margin=st.integers(0, 50))
def test_regions_grow_within_the_image_and_around_the_box(box: Box, area: int, margin: int) -> None:
    config = LocalizerConfig(kind="engine", min_area=area / 100, margin=margin / 100)
    region, _ = settle(located(None, box), config)
    assert region is not None
    (grown,) = region.boxes
    assert grown.x0 <= box.x0 + 1e-9
    assert grown.y0 <= box.y0 + 1e-9
    assert grown.x1 >= box.x1 - 1e-9
    assert grown.y1 >= box.y1 - 1e-9
    assert min(grown.x0, grown.y0, 1 - grown.x1, 1 - grown.y1) >= 0
    assert (grown.x1 - grown.x0) * (grown.y1 - grown.y0) >= config.min_area - 1e-9


def test_a_configuration_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValidationError, match="base_url"):
        LocalizerConfig(kind="openai", model="m")
    with pytest.raises(ValidationError, match="question"):
        LocalizerConfig(prompt="Where?")
    with pytest.raises(ValidationError):
        LocalizerConfig(kind="psychic")  # type: ignore[arg-type]


def user(text: str | None, images: int = 0) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": "data:"}}] * images
    return {"role": "user", "content": parts + ([] if text is None else [{"type": "text", "text": text}])}


FIRST = [
    {"role": "system", "content": "Be brief."},
    user("What number is on the circle?", images=2),
    {"role": "assistant", "content": "Four."},
]


def test_an_image_keeps_the_question_it_came_with() -> None:
    followed = [*FIRST, user("And on the square?", images=1)]
    asked = "What number is on the circle?"
    assert questions_of(FIRST, "pinned") == [asked, asked]
    assert questions_of(followed, "pinned") == [asked, asked, "And on the square?"]
    assert questions_of(followed, "latest") == ["And on the square?"] * 3
    assert questions_of(followed, "off") == [None] * 3


def test_an_image_without_words_belongs_to_the_next_question_or_the_last() -> None:
    assert questions_of([user(None, 1), user("Which?")], "pinned") == ["Which?"]
    assert questions_of([user("Which?"), user(None, 1)], "pinned") == ["Which?"]
    assert questions_of([user(None, 1)], "pinned") == [None]
    assert questions_of([{"role": "tool", "content": user(None, 1)["content"]}, user("Q?")], "pinned") == [
        "Q?"
    ]


def test_every_shape_of_a_message_is_understood() -> None:
    images = [{"image_url": "data:"}, {"type": "input_image", "image_url": "data:"}]
    message = {"role": "user", "content": [*images, "which", {"text": " one?"}]}
    assert questions_of([message], "pinned") == ["which one?"] * 2
    empty = [{"role": "user", "content": None}, {"role": "user", "content": "text"}]
    assert questions_of(empty, "pinned") == []


def test_a_long_question_keeps_its_end() -> None:
    assert normalised(f"{'x ' * LONGEST_QUESTION}\n\t why?").endswith("x why?")
    assert len(normalised("x" * 10**5)) == LONGEST_QUESTION


def resize_geometry() -> Any:
    return SmartResize(token_side=16, min_pixels=64 * 64, max_pixels=768 * 768)


@given(width=st.integers(20, 2000), height=st.integers(20, 2000), most=st.integers(16, 300))
def test_thumbnails_cost_no_more_than_allowed(width: int, height: int, most: int) -> None:
    if max(width, height) > 100 * min(width, height):
        return
    size = size_for_tokens(resize_geometry(), width, height, most)
    if size is not None:
        assert resize_geometry().grid(*size).num_tokens <= 2 * most
        assert size[0] <= width
        assert size[1] <= height


def test_a_thumbnail_of_384_pixels_has_64_tokens_of_them() -> None:
    assert size_for_tokens(resize_geometry(), 384, 384, 64) == (128, 128)
    assert size_for_tokens(resize_geometry(), 100, 100, 64) == (100, 100)


@pytest.mark.parametrize(
    ("size", "tokens"), [((1280, 720), 66), ((640, 480), 70), ((512, 512), 64), ((300, 1500), 72)]
)
def test_the_least_an_image_processor_makes_of_an_image_is_small_enough(
    size: tuple[int, int], tokens: int
) -> None:
    """Qwen3-VL's takes no fewer than 65,536 pixels, 64 tokens if the image is square."""
    published = {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "merge_size": 2,
    }
    geometry = Qwen3VLGeometry.from_configs(
        {"text_config": {"num_hidden_layers": 36}, "vision_config": {"patch_size": 16}}, published
    )
    found = size_for_tokens(geometry, *size, 64)
    assert found is not None
    assert geometry.grid(*found).num_tokens == tokens


def test_where_every_image_costs_the_same_none_is_smaller() -> None:
    class Fixed:
        def grid(self, width: int, height: int) -> TokenGrid:
            return TokenGrid(24, 24)

    assert size_for_tokens(Fixed(), 500, 300, 64) is None  # type: ignore[arg-type]


def picture(item: Any) -> Picture:
    found = as_picture(item)
    assert found is not None
    return found


def test_pictures_are_known_by_what_they_show() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    assert picture(red).key() == picture(red.copy()).key()
    different = [red, blue, red.resize((4, 16)), red.convert("L")]
    assert len({picture(image).key() for image in different}) == len(different)
    assert picture(red).open() is red
    assert as_picture({"image_embeds": 1}) is None
    assert as_picture(None) is None
    assert shrink(Image.new("CMYK", (64, 64)), (16, 16)).mode == "RGB"


def test_palettes_are_part_of_what_a_picture_shows() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour).quantize(2) for colour in ("red", "blue"))
    assert red.tobytes() == blue.tobytes()
    assert picture(red).key() != picture(blue).key()


def test_encoded_pictures_are_known_by_their_bytes_and_how_they_were_decoded() -> None:
    def decoded(encoded: bytes, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(media=Image.new("RGB", (8, 8)), original_bytes=encoded, io_config=settings)

    on_white, on_black = (
        decoded(b"png", image_mode="RGB", rgba_background_color=colour)
        for colour in ((255, 255, 255), (0, 0, 0))
    )
    assert len({picture(item).key() for item in (on_white, on_black, decoded(b"png"), decoded(b"jpg"))}) == 4
    assert picture(on_white).key() == picture(decoded(b"png", **on_white.io_config)).key()


@pytest.mark.parametrize("shape", [(20, 30, 3), (3, 20, 30), (20, 30, 1), (20, 30, 4)])
def test_arrays_are_pictures(shape: tuple[int, ...]) -> None:
    assert picture(np.zeros(shape, np.uint8)).open().size == (30, 20)


@pytest.mark.parametrize("array", [np.zeros((20, 30), np.uint8), np.zeros((2, 3, 20, 30), np.uint8)])
def test_other_arrays_are_none(array: Any) -> None:
    assert as_picture(array) is None
    assert as_picture(np.zeros((20, 30, 3), np.float32)) is None


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA"])
def test_huge_pictures_are_reduced_before_they_are_converted(mode: str) -> None:
    """As good as exactly: 17 megapixels of a gradient, down to what a localizer looks at."""
    small = Image.linear_gradient("L").resize((512, 512)).convert("RGB")
    huge = small.resize((4200, 4100)).convert(mode)
    assert huge.width * huge.height > 16_000_000
    exact = huge.convert("RGB").resize((112, 110), Image.Resampling.BOX)
    off = np.abs(np.asarray(shrink(huge, (112, 110)), np.int16) - np.asarray(exact, np.int16))
    assert off.mean() < 1
    assert off.max() < 16


class Work:
    """Work that can be let go, and counts."""

    def __init__(self, fail: bool = False) -> None:
        self.started = self.cancelled = 0
        self.done, self.fail = asyncio.Event(), fail

    async def __call__(self) -> str:
        self.started += 1
        try:
            await self.done.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fail:
            raise ValueError("no")
        return f"answer {self.started}"


def test_those_who_ask_together_share_one_answer() -> None:
    async def scenario() -> None:
        answers, work = SharedAnswers[str](10), Work()
        tasks = [asyncio.ensure_future(answers.make("key", work)) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # who asked first goes away
        work.done.set()
        assert await asyncio.gather(*tasks[1:]) == ["answer 1"] * 4
        assert tasks[0].cancelled()
        assert await answers.make("key", work) == "answer 1"
        assert (work.started, work.cancelled) == (1, 0)

    asyncio.run(scenario())


def test_work_nobody_waits_for_is_cancelled_and_begun_anew_when_asked_again() -> None:
    async def scenario() -> None:
        answers, work = SharedAnswers[str](10), Work()
        tasks = [asyncio.ensure_future(answers.make("key", work)) for _ in range(2)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        again = asyncio.ensure_future(answers.make("key", work))  # before the cancelled work has ended
        await asyncio.sleep(0)
        work.done.set()
        assert await again == "answer 2"
        assert (work.started, work.cancelled) == (2, 1)
        assert not answers._running

    asyncio.run(scenario())


def test_failures_reach_all_who_wait_and_are_not_remembered() -> None:
    async def scenario() -> None:
        answers, work = SharedAnswers[str](10), Work(fail=True)
        work.done.set()
        failed = await asyncio.gather(*(answers.make("key", work) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in failed] == [ValueError] * 3
        work.fail = False
        assert await answers.make("key", work) == "answer 2"

    asyncio.run(scenario())


def test_the_answer_not_asked_for_the_longest_is_forgotten() -> None:
    answers = SharedAnswers[str](2)
    answers.put("a", "1")
    answers.put("b", "2")
    assert answers.get("a") == "1"
    answers.put("c", "3")
    assert [answers.get(key) for key in "abc"] == ["1", None, "3"]
    nothing = SharedAnswers[str](0)
    nothing.put("a", "1")
    assert nothing.get("a") is None
