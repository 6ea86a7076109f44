# SPDX-License-Identifier: Apache-2.0
"""Calibration's pure parts: scenes, the rule, scores, and what is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.pictures import noise_image
from vllm_crop.calibrating import fitting, scoring
from vllm_crop.calibrating.data import CalibrationDataError, generated, read_pictures
from vllm_crop.calibrating.rule import changes, looking_layers, question_change
from vllm_crop.calibrating.scenes import Scene, make_scene
from vllm_crop.planning.geometry import Box, Region


def region(*boxes: tuple[float, float, float, float]) -> Region:
    return Region(tuple(Box(*box) for box in boxes))


class TestScenes:
    @given(st.integers(0, 2**40))
    def test_a_scene_is_that_of_its_seed(self, seed: int) -> None:
        scene = make_scene(seed, 512)
        assert scene == make_scene(seed, 512)
        assert max(scene.size) == 512

    @given(st.integers(0, 2**40))
    def test_each_question_has_one_answer_and_its_own_place(self, seed: int) -> None:
        scene = make_scene(seed)
        names = [(card.kind, name) for card, _ in scene.cards for name, _ in card.rows]
        assert len(set(names)) == len(names)
        *local, last = scene.questions(4)
        assert len(local) == 4
        assert last.box is None
        boxes = [one.box for one in local]
        for index, box in enumerate(boxes):
            assert box is not None
            assert 0 <= box.x0 < box.x1 <= 1
            assert 0 <= box.y0 < box.y1 <= 1
            for other in boxes[:index]:
                assert other is not None
                assert scoring.coverage(Region((box,)), Region((other,))) < 0.01

    def test_a_row_is_drawn_where_its_box_is(self) -> None:
        """The same scene with other values differs there and nowhere else."""
        scene = make_scene(12)
        (card, place) = scene.cards[0]
        rows = tuple((name, value[::-1]) for name, value in card.rows)
        other = type(card)(card.kind, rows, card.letters, card.paper)
        changed = Scene(scene.size, ((other, place), *scene.cards[1:]), scene.seed)
        assert card.size == other.size
        differ = (np.asarray(scene.picture()) != np.asarray(changed.picture())).any(-1)
        assert differ.any()
        for x0, y0, x1, y1 in card.boxes(*place):
            differ[int(y0) : int(y1) + 2, int(x0) : int(x1) + 2] = False
        assert not differ.any()

    def test_letters_have_several_sizes_and_places_are_anywhere(self) -> None:
        cards = [one for seed in range(40) for one in make_scene(seed).cards]
        assert len({card.letters for card, _ in cards}) >= 10
        assert {card.kind for card, _ in cards} == {"sign", "label", "clock", "form", "list"}
        columns = np.histogram([x for _, (x, _) in cards], 8, (0, 900))[0]
        assert columns.min() > 10


class TestRule:
    def test_change_is_one_minus_cosine_of_each_pair(self) -> None:
        random = np.random.default_rng(0)
        maps = random.random((3, 2, 7))
        found = changes(maps)
        assert found.shape == (3, 2)
        for pair, (one, other) in enumerate(((0, 1), (0, 2), (1, 2))):
            for layer in range(2):
                a, b = maps[one, layer], maps[other, layer]
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                assert found[pair, layer] == pytest.approx(1 - cosine)

    def test_pictures_count_by_their_pairs_and_may_have_maps_of_any_size(self) -> None:
        same, other = np.ones((2, 1, 4)), np.eye(3)[:, None, :]
        assert question_change([same, other]) == pytest.approx([3 / 4])
        with pytest.raises(ValueError, match="no picture has two questions"):
            question_change([np.ones((1, 2, 4))])

    def test_a_layer_that_sees_nothing_does_not_look(self) -> None:
        maps = np.zeros((2, 2, 3))
        maps[:, 1] = [[1, 0, 0], [0, 1, 0]]
        assert question_change([maps]) == pytest.approx([0, 1])

    def test_layers_with_half_of_the_largest_change_are_taken(self) -> None:
        assert looking_layers(np.array([0.1, 0.2, 0.4, 0.19]), [8, 5, 6, 7]) == [5, 6]
        with pytest.raises(ValueError, match="no layer looks elsewhere"):
            looking_layers(np.zeros(3), [0, 1, 2])


class TestFitting:
    """Layers 0 and 3 look at the needed cell, each a little; 1 and 2 are noise, 4 at what is not needed."""

    def examples(self, count: int, seed: int = 0) -> list[fitting.Example]:
        random = np.random.default_rng(seed)
        made = []
        for number in range(count):
            needed = np.zeros(25, dtype=bool)
            needed[random.choice(25, 2, replace=False)] = True
            maps = random.lognormal(0, 1, (5, 25))
            maps[0][needed] *= 4
            maps[3][needed] *= 4
            maps[4][needed] /= 4
            one = fitting.example(maps, needed, number)
            assert one is not None
            made.append(one)
        return made

    def test_layers_that_look_are_weighted_and_others_are_not(self) -> None:
        weights = fitting.fit(self.examples(400))
        assert min(weights[0], weights[3]) > 1
        assert abs(weights[1:3]).max() < 0.3
        assert weights[4] < -1

    def test_on_new_questions_it_is_better_than_the_best_layer(self) -> None:
        weights = fitting.fit(self.examples(60))
        fresh = self.examples(60, seed=1)
        hits = [one.needed[(one.logs @ weights).argmax()] for one in fresh]
        best = max(sum(one.needed[one.logs[:, layer].argmax()] for one in fresh) for layer in range(5))
        assert sum(hits) > best

    @pytest.mark.parametrize("penalty", [1.0, 0.1])
    def test_it_finds_the_minimum(self, penalty: float) -> None:
        examples = self.examples(30)

        def loss(weights: Any) -> float:
            mean = sum(fitting.surprise(one, weights) for one in examples) / len(examples)
            return mean + penalty / 2 * float(weights @ weights)

        found = fitting.fit_with(examples, penalty)
        least = loss(found)
        for index in range(5):
            for step in (-0.02, 0.02):
                moved = found.copy()
                moved[index] += step
                assert loss(moved) > least

    def test_noise_is_left_alone(self) -> None:
        examples = self.examples(40)
        random = np.random.default_rng(5)
        noise = [
            fitting.Example(one.logs[random.permutation(25)], one.needed, one.picture) for one in examples
        ]
        assert abs(fitting.fit(noise)).max() < 0.3

    def test_what_cannot_be_fitted(self) -> None:
        with pytest.raises(ValueError, match="weights need 10 questions"):
            fitting.fit(self.examples(9))
        maps = np.ones((2, 4))
        assert fitting.example(maps, np.zeros(4, dtype=bool), 0) is None
        assert fitting.example(maps, np.ones(4, dtype=bool), 0) is None
        # The ring is in no map.
        maps[:, 0] = 0
        one = fitting.example(maps, np.array([True, True, False, False]), 0)
        assert one is not None
        assert one.needed.tolist() == [True, False, False]


class TestScores:
    def test_coverage_counts_overlapping_boxes_once(self) -> None:
        needed = region((0, 0, 0.4, 0.4), (0.2, 0.2, 0.6, 0.6))
        assert scoring.area(needed) == pytest.approx(0.28)
        assert scoring.coverage(region((0, 0, 0.4, 0.4)), needed) == pytest.approx(0.16 / 0.28)
        assert scoring.coverage(region((0.1, 0, 0.3, 1), (0.2, 0, 0.4, 1)), needed) == pytest.approx(
            0.16 / 0.28
        )
        assert scoring.coverage(region((0.7, 0.7, 1, 1)), needed) == 0

    def test_a_hit_shows_half_of_one_of_the_boxes(self) -> None:
        window = Box(0, 0, 0.25, 0.25)
        assert scoring.is_hit(window, region((0.2, 0.1, 0.3, 0.2)))
        assert not scoring.is_hit(window, region((0.21, 0.1, 0.3, 0.2)))
        assert scoring.is_hit(window, region((0.8, 0.8, 0.9, 0.9), (0.1, 0.1, 0.2, 0.2)))

    def test_random_windows_lie_within_the_picture(self) -> None:
        windows = list(scoring.random_windows(200, 3))
        assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in windows)
        assert windows == list(scoring.random_windows(200, 3))

    def test_auroc_is_the_chance_to_tell_right_from_wrong(self) -> None:
        assert scoring.auroc([0.9, 0.8, 0.1], [True, True, False]) == 1
        assert scoring.auroc([0.5, 0.5], [True, False]) == 0.5
        assert scoring.auroc([0.5, 0.5], [True, True]) is None

    def test_the_threshold_is_the_lowest_that_covers_enough(self) -> None:
        told = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
        covered = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        threshold = scoring.lowest_threshold(told, covered, 0.95)
        assert threshold == pytest.approx(0.25)
        assert scoring.kept(0.25, told, covered) == scoring.Kept(5, 7, 1.0)
        assert scoring.lowest_threshold(told, covered, 0.5) == 0
        assert scoring.lowest_threshold(told, [0.5] * 7, 0.9) is None
        # What only luck reaches is not taken.
        assert scoring.lowest_threshold(told, [0.0] * 6 + [1.0], 0.9) is None


class TestData:
    def write(self, folder: Path, *lines: Any) -> Path:
        for name in ("a.png", "b.png"):
            noise_image(3, 40, 30).save(folder / name)
        path = folder / "q.jsonl"
        path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
        return path

    def test_lines_of_a_picture_belong_together(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            {"image": "a.png", "question": "one?", "boxes": [[0.1, 0.1, 0.2, 0.3]], "id": 7},
            {"image": "b.png", "question": "one?"},
            "",
            {"image": "a.png", "question": "all?", "boxes": []},
            {"image": "b.png", "question": "two?", "boxes": None},
        )
        first, second = read_pictures(path, (), None)
        assert [(one.text, one.needs) for one in first.questions] == [
            ("one?", region((0.1, 0.1, 0.2, 0.3))),
            ("all?", Region.whole()),
        ]
        assert [one.is_local for one in first.questions] == [True, False]
        assert [one.needs for one in second.questions] == [None, None]
        assert first.open().size == (40, 30)

    def test_a_folder_is_asked_the_same_about_every_picture(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        pictures = read_pictures(tmp_path, ("one?", "two?", "one?"), None)
        assert [picture.name for picture in pictures] == ["a.png", "b.png"]
        assert [one.text for one in pictures[0].questions] == ["one?", "two?"]
        with pytest.raises(CalibrationDataError, match="say with --question, two times or more"):
            read_pictures(tmp_path, ("one?",), None)

    def test_every_bad_line_is_named(self, tmp_path: Path) -> None:
        good = {"image": "a.png", "question": "one?"}
        path = self.write(
            tmp_path,
            good,
            "{",
            [],
            {"image": "a.png"},
            {**good, "image": "c.png"},
            {**good, "image": "q.jsonl"},
            {**good, "boxes": [[0.5, 0.5, 0.4, 0.6]]},
        )
        with pytest.raises(CalibrationDataError) as caught:
            read_pictures(path, (), None)
        said = str(caught.value)
        assert "6 bad" in said
        for part in (
            "line 2: no JSON",
            "line 3: must be a JSON object",
            "line 4: question: ",
            "line 5: there is no file",
            "line 6: ",
            "line 7: boxes: box must have",
        ):
            assert part in said

    def test_too_little_to_compare_is_refused(self, tmp_path: Path) -> None:
        lines = [{"image": "a.png", "question": "one?"}, {"image": "a.png", "question": "two?"}]
        path = self.write(tmp_path, *lines)
        with pytest.raises(CalibrationDataError, match="has 1 pictures: at least 2"):
            read_pictures(path, (), None)
        path = self.write(tmp_path, *lines, {"image": "b.png", "question": "one?"})
        with pytest.raises(CalibrationDataError, match=r"second half .* has two different questions"):
            read_pictures(path, (), None)
        with pytest.raises(CalibrationDataError, match="belongs to a folder"):
            read_pictures(path, ("one?",), None)

    def test_generated_scenes_have_places(self) -> None:
        pictures = generated(2, 3, 256, 5)
        assert all(sum(one.is_local for one in picture.questions) == 3 for picture in pictures)
        assert isinstance(pictures[0].open(), Image.Image)
        assert pictures[0].questions != pictures[1].questions
