# SPDX-License-Identifier: Apache-2.0
"""Scenes, their pictures and questions: every question has one right answer, and its region shows it."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.tinyvqa.drawing import CELL, THUMBNAIL, draw_scene, thumbnail
from lab.tinyvqa.questions import FAMILIES, GLOBAL, LOCAL, Question, ask
from lab.tinyvqa.scenes import COLOURS, SHAPES, Scene, Thing, make_scene, neighbours
from vllm_crop.localizers.dialects import WHOLE

SEEDS = st.integers(0, 2**40)
SIDES = st.integers(3, 8)


@given(SEEDS, SIDES)
def test_things_have_a_name_and_a_cell_of_their_own(seed: int, side: int) -> None:
    scene = make_scene(seed, side, (3, 9))
    assert 3 <= len(scene.things) <= 9
    assert len({thing.name for thing in scene.things}) == len(scene.things)
    assert len({thing.cell for thing in scene.things}) == len(scene.things)
    for thing in scene.things:
        assert all(0 <= number < side for number in thing.cell)
        assert all(abs(offset) + thing.size / 2 <= 0.5 for offset in thing.offset)
    assert make_scene(seed, side, (3, 9)) == scene


def test_some_colours_are_common() -> None:
    """Else counting would be answered by "one or two"."""
    most = [max(Counter(t.colour for t in make_scene(seed).things).values()) for seed in range(200)]
    assert {2, 3, 4} <= set(most)


def questions(family: str, count: int = 200) -> list[tuple[Scene, Question]]:
    found = []
    for seed in range(count):
        scene = make_scene(seed)
        question = ask(scene, family, random.Random(seed))
        if question is not None:
            found.append((scene, question))
    assert len(found) > count * 0.8
    return found


def named(scene: Scene, text: str) -> list[Thing]:
    """The things a text names, in its order."""
    found = [(text.index(thing.name), thing) for thing in scene.things if thing.name in text]
    return [thing for _, thing in sorted(found, key=lambda pair: pair[0])]


def answer_by_looking(scene: Scene, question: Question) -> str:
    """The answer, found from the text alone."""
    text, things = question.text, named(scene, question.text)
    if question.family == "read":
        return things[0].digit
    if question.family == "relation":
        where = next(where for where in neighbours((0, 0)) if where in text)
        other = scene.at(neighbours(things[0].cell)[where])
        assert other is not None
        return other.digit
    if question.family == "compare":
        return max(things, key=lambda thing: int(thing.digit)).name
    if question.family == "search":
        (thing,) = [thing for thing in scene.things if thing.digit in text]
        return thing.colour if "colour" in text else thing.shape
    wanted = next((name for name in (*COLOURS, *SHAPES) if f" {name}" in text), "")
    return str(sum(wanted in (thing.colour, thing.shape) for thing in scene.things))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family: str) -> None:
    for scene, question in questions(family):
        assert question.answer == answer_by_looking(scene, question), question.text


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_vary(family: str) -> None:
    """Always the same guess is seldom right."""
    counts = Counter(question.answer for _, question in questions(family))
    assert max(counts.values()) < 0.45 * counts.total()


@pytest.mark.parametrize("family", LOCAL)
def test_the_region_shows_what_is_asked_for_and_little_else(family: str) -> None:
    for scene, question in questions(family):
        cells = {
            (row, col)
            for x0, y0, x1, y1 in question.boxes
            for row in range(y0, y1 + 1)
            for col in range(x0, x1 + 1)
        }
        assert {thing.cell for thing in named(scene, question.text)} <= cells
        assert set(question.decisive) <= cells
        assert len(cells) == (1 if family == "read" else 2)
        region = question.region(scene.side)
        area = sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in region.boxes)
        assert area == pytest.approx(len(cells) / scene.side**2)
        assert len(question.location) == 4 * len(question.boxes)


@pytest.mark.parametrize("family", GLOBAL)
def test_the_region_of_a_global_question_is_the_whole_image(family: str) -> None:
    for scene, question in questions(family, 50):
        assert question.location == WHOLE
        assert question.region(scene.side).as_lists() == [[0.0, 0.0, 1.0, 1.0]]


def pixels_of(scene: Scene, thing: Thing) -> np.ndarray:
    row, col = thing.cell
    picture = np.asarray(draw_scene(scene), dtype=int)
    return picture[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]


def test_a_thing_is_drawn_in_its_cell() -> None:
    red = Thing("red", "square", "7", (1, 2))
    without, alone = Scene((), 4, 1), Scene((red,), 4, 1)
    changed = np.abs(np.asarray(draw_scene(alone), dtype=int) - np.asarray(draw_scene(without), dtype=int))
    rows, cols = np.nonzero(changed.max(axis=-1) > 40)
    assert rows.min() >= CELL
    assert rows.max() < 2 * CELL
    assert cols.min() >= 2 * CELL
    assert cols.max() < 3 * CELL
    centre = pixels_of(alone, red)[8:12, 20:28].mean(axis=(0, 1))
    assert centre[0] > 150 > 100 > centre[1]


def test_digits_differ_at_full_size() -> None:
    scenes = [Scene((Thing("blue", "circle", digit, (0, 0)),), 3, 5) for digit in "17"]
    one, seven = (pixels_of(scene, scene.things[0]) for scene in scenes)
    assert (np.abs(one - seven).max(axis=-1) > 60).sum() >= 12


def test_the_same_scene_is_the_same_picture() -> None:
    assert draw_scene(make_scene(3)).tobytes() == draw_scene(make_scene(3)).tobytes()
    assert draw_scene(make_scene(3)).tobytes() != draw_scene(make_scene(5)).tobytes()


def test_a_thumbnail_has_a_token_for_each_cell() -> None:
    picture = draw_scene(make_scene(3))
    assert picture.size == (8 * CELL, 8 * CELL)
    assert thumbnail(picture).size == (8 * THUMBNAIL, 8 * THUMBNAIL)
