# SPDX-License-Identifier: Apache-2.0
"""What `calibrate` prints, draws and writes of an outcome, and what it refuses before anything starts."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_json import QWEN2_5_VL, write_json, write_qwen2_5_vl
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vllm_crop.calibrating.data import Asked
from vllm_crop.calibrating.looking import Look
from vllm_crop.calibrating.outcome import CHOSEN, RANDOM, Confidences, Outcome, Places, Plan
from vllm_crop.calibrating.picture import draw_outcome
from vllm_crop.calibrating.report import make_calibration, print_outcome, write_calibration
from vllm_crop.commands.app import app
from vllm_crop.localizers.calibration import Calibration
from vllm_crop.planning.geometry import Box, Region

HERE = Region((Box(0.1, 0.1, 0.2, 0.2),))
ALL = Region.whole()


def look(x: float, confidence: float = 0.5) -> Look:
    window = Box(x, x, x + 0.25, x + 0.25)
    return Look(np.ones(4), window, Region((window,)), confidence, 0.02)


def outcome(*asked: Asked, threshold: float | None = 0.3) -> Outcome:
    """Layer 5 finds what is asked for, layer 4 does not."""
    plan = Plan((4, 5), (4,), (64,), ("cells",), None, 0.8)
    found = Outcome(
        plan,
        np.array([0.1, 0.4]),
        [5],
        {4: Places(), 5: Places()},
        {4: Confidences(), 5: Confidences()},
        rows={CHOSEN: Places(), RANDOM: Places()},
        threshold=threshold,
        pictures=(2, 3),
        questions=(8, 12),
    )
    for one in asked:
        right, wrong = look(0.05, 0.6 if one.is_local else 0.2), look(0.7)
        for layer, place in ((4, wrong), (5, right)):
            found.by_layer[layer].add(one, place)
            found.sure_by_layer[layer].add(one, place)
        found.rows[CHOSEN].add(one, right)
        found.rows[RANDOM].add(one, wrong)
        found.test.add(one, right)
        found.dev.add(one, right)
        found.seconds.append(right.seconds)
    return found


def printed(of: Outcome) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_outcome(console, of)
    file: Any = console.file
    return str(file.getvalue())


WITH_BOXES = (Asked("where?", HERE), Asked("how many?", ALL), Asked("which?", HERE))


def test_tables_have_every_layer_and_row_with_n() -> None:
    said = printed(outcome(*WITH_BOXES))
    assert "100.0 % (34-100), n 2" in said  # layer 5
    assert "0.0 % (0-66), n 2" in said  # layer 4
    assert "8 questions about 2 pictures" in said
    assert "12 about 3 others" in said
    assert "whole_below, for 0.8" in said
    # Told apart: 0.6 for both questions about a place, 0.2 for the other one.
    assert "of what is served 1.00" in said


def test_without_boxes_the_rule_is_shown_and_nothing_is_claimed() -> None:
    said = printed(outcome(Asked("where?", None), Asked("which?", None), threshold=None))
    assert "0.400" in said
    assert "Without boxes nobody knows" in said
    assert "%" not in said


def test_a_coverage_that_is_out_of_reach_is_said() -> None:
    assert "No threshold reaches the wanted coverage of 0.8" in printed(outcome(*WITH_BOXES, threshold=None))


@pytest.mark.parametrize("asked", [WITH_BOXES, (Asked("where?", None),)], ids=["boxes", "none"])
def test_the_picture_is_drawn(tmp_path: Path, asked: tuple[Asked, ...]) -> None:
    pytest.importorskip("matplotlib")
    draw_outcome(outcome(*asked), tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert picture.height > 300


def test_what_is_no_better_than_chance_is_told_from_what_is() -> None:
    places = tuple(Asked(f"{number}?", HERE) for number in range(6))
    found = outcome(*places)
    assert found.beats_chance() is True
    # Wrong everywhere; then right, and chance as good.
    found.rows[CHOSEN].hits = [False] * 6
    assert found.beats_chance() is False
    found.rows[CHOSEN].hits = found.rows[RANDOM].hits = [True] * 6
    assert found.beats_chance() is False
    assert found.too_few, "of six"
    assert not outcome(*places, *places).too_few
    without_boxes = outcome(Asked("where?", None))
    assert without_boxes.beats_chance() is None
    assert not without_boxes.too_few


def test_the_file_has_settings_scores_and_where_they_are_from(tmp_path: Path) -> None:
    made = make_calibration(
        outcome(*WITH_BOXES), {"thumbnail_tokens": 64}, "M", QWEN2_5_VL, {"date": "today"}
    )
    path = tmp_path / "new" / "file.json"
    write_calibration(path, made)
    assert Calibration.read(path) == made
    assert made.settings == {"thumbnail_tokens": 64, "layers": [5], "whole_below": 0.3}
    assert made.provenance["questions"] == {"decided": 8, "judged": 12}
    assert made.scores["question_change"] == {"4": 0.1, "5": 0.4}
    assert made.scores["by_layer"]["5"]["hit"]["n"] == 2
    assert list(path.parent.iterdir()) == [path]


def test_confidences_tell_questions_about_places() -> None:
    told = Confidences()
    for asked, found in ((WITH_BOXES[0], look(0.05, 0.9)), (WITH_BOXES[2], look(0.7, 0.4))):
        told.add(asked, found)
    assert (told.tells_hits(), told.tells_places()) == (1.0, None)
    told.add(WITH_BOXES[1], look(0.3, 0.6))
    assert (told.hits, told.tells_places()) == ([True, False, None], 0.5)
    assert told.covered[2] == pytest.approx(0.0625)


class TestRefusals:
    def refused(self, *options: str) -> str:
        result = CliRunner().invoke(app, ["calibrate", *options], env={"COLUMNS": "300"})
        assert result.exit_code in (1, 2), result.output
        return " ".join(result.output.split())

    def test_a_model_that_is_not_supported(self, tmp_path: Path) -> None:
        model = write_json(tmp_path, config={"architectures": ["BertModel"]})
        assert "architectures ['BertModel'] are not supported" in self.refused("--model", model)

    def test_a_model_without_full_attention(self, tmp_path: Path) -> None:
        model = write_qwen2_5_vl(tmp_path)
        kinds = {**QWEN2_5_VL, "layer_types": ["sliding_attention"] * 28}
        (tmp_path / "config.json").write_text(json.dumps(kinds))
        assert "no layer of" in self.refused("--model", model)
        assert "kind 'engine' can" in self.refused("--model", model)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--layers", "3,x"), "'x': a layer or a range"),
            (("--layers", "20-28"), "decoder layers are 0 to 27"),
            (("--engine", "words"), "words: not of"),
            (("--engine-prompt", "where?"), "must contain {question}"),
            (("--localizer-config", "{"), "no JSON"),
            (("--localizer-config", '{"layers": [3]}'), "a JSON object with some of thumbnail_tokens"),
            (("--localizer-config", '{"window": 7}'), "localizer.window"),
            (("--question", "one?"), "belongs to --data"),
            (("--fit", "--pictures", "2"), "--fit needs 10 questions with boxes in the deciding half"),
        ],
        ids=str,
    )
    def test_wrong_options(self, tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
        assert reason in self.refused("--model", write_qwen2_5_vl(tmp_path), *options)
