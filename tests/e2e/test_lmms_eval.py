# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval says, on a real engine, where boxes cannot be sent. That they arrive, the proof shows."""

import json
from pathlib import Path

import pytest

from lab.demo.setting import MODEL
from lab.lmms_eval.running import RunError, run_lmms_eval
from lab.lmms_eval.task import write_task
from lab.lmms_eval.ways import CROP, ENGINE

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.e2e
SETTINGS = {"model": MODEL, **ENGINE, "additional_config": {"crop": CROP}}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task", 1, "dev")


def test_a_task_whose_documents_have_no_such_field_is_refused(task: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"documents of tinyvqa have no field 'places'.*only image, question"):
        run_lmms_eval("crop_oracle", {**SETTINGS, "boxes": "places"}, task, tmp_path / "run")


def test_boxes_that_are_no_fractions_are_refused(task: Path, tmp_path: Path) -> None:
    path = task / "questions.jsonl"
    documents = [json.loads(line) | {"boxes": [[10, 20, 30, 40]]} for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(one)}\n" for one in documents))
    with pytest.raises(RunError, match=r"a box must be four fractions .* got \[10, 20, 30, 40\]"):
        run_lmms_eval("crop_oracle", SETTINGS, task, tmp_path / "run")


def test_without_settings_for_pruning_no_engine_is_started(task: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "additional_config"}
    with pytest.raises(RunError, match="crop_oracle prunes, and needs settings for it"):
        run_lmms_eval("crop_oracle", settings, task, tmp_path / "run")
    assert "EngineCore" not in (tmp_path / "run" / "log").read_text()
