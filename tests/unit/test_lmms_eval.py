# SPDX-License-Identifier: Apache-2.0
"""tinyvqa as a task of lmms-eval; what needs lmms-eval itself is skipped without it."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageChops

from lab.evaluation.asking import ANSWER_STEPS
from lab.evaluation.published_answers import PublishedAnswers
from lab.evaluation.questions import TestScene, make_split
from lab.lmms_eval.comparison import differences, table
from lab.lmms_eval.running import Answers
from lab.lmms_eval.task import ELSEWHERE, NAME, write_task
from lab.lmms_eval.ways import WAYS
from lab.tinyvqa.questions import FAMILIES, GLOBAL, Question
from vllm_crop.errors import InvalidConfigError
from vllm_crop.planning.geometry import GRID_CELLS

ROOT = Path(__file__).parents[2]
PER_FAMILY = 4
ASKED = [(scene, one) for scene in make_split("dev", PER_FAMILY) for one in scene.questions]


class Functions(yaml.SafeLoader):
    """Reads `!function module.name` as a text."""


Functions.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), PER_FAMILY, "dev")


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(folder: Path) -> Any:
    return yaml.load((folder / f"{NAME}.yaml").read_text(), Functions)


@pytest.fixture(scope="module")
def scoring(folder: Path) -> Any:
    """As lmms-eval loads it: the file of that name beside the YAML file."""
    spec = importlib.util.spec_from_file_location("scoring", folder / "scoring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size(box: list[float]) -> tuple[float, float]:
    x0, y0, x1, y1 = box
    return x1 - x0, y1 - y0


def test_documents_are_the_questions_of_the_split_in_order(documents: list[dict[str, Any]]) -> None:
    assert len(documents) == PER_FAMILY * len(FAMILIES)
    written = [(one["question"], one["answer"], one["family"]) for one in documents]
    assert written == [(asked.text, asked.answer, asked.family) for _, asked in ASKED]


def test_boxes_are_those_of_the_answers_and_elsewhere_of_the_same_size(
    documents: list[dict[str, Any]],
) -> None:
    moved = 0
    for document, (_, asked) in zip(documents, ASKED, strict=True):
        boxes, elsewhere = document["boxes"], document[ELSEWHERE]
        assert boxes == ([] if asked.family in GLOBAL else asked.region(GRID_CELLS).as_lists())
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in boxes + elsewhere)
        if boxes:
            assert [*map(size, elsewhere)] == [*map(size, boxes)]
            moved += elsewhere != boxes
    assert moved > PER_FAMILY


def test_pictures_are_the_scenes_to_the_pixel(documents: list[dict[str, Any]], scoring: Any) -> None:
    for document, (scene, _) in zip(documents, ASKED, strict=True):
        (picture,) = scoring.pictures(document)
        assert isinstance(picture, Image.Image)
        assert ImageChops.difference(picture, scene.picture()).getbbox() is None


def test_only_the_answer_word_for_word_is_right(documents: list[dict[str, Any]], scoring: Any) -> None:
    document = documents[0]
    assert scoring.exact(document, [f" {document['answer']}\n"]) == {"exact": 1.0, document["family"]: 1.0}
    for wrong in ("", "x", f"{document['answer']}.", f"{document['answer']} {document['answer']}"):
        assert scoring.exact(document, [wrong]) == {"exact": 0.0, document["family"]: 0.0}


def test_the_yaml_file_names_what_is_beside_it(
    settings: Any, folder: Path, documents: list[dict[str, Any]], scoring: Any
) -> None:
    assert settings["task"] == NAME
    assert (folder / settings["dataset_kwargs"]["data_files"][settings["test_split"]]).exists()
    assert {settings["doc_to_text"], settings["doc_to_target"]} <= documents[0].keys()
    for key in ("doc_to_visual", "process_results"):
        module, _, function = settings[key].partition(".")
        assert module == "scoring"
        assert callable(getattr(scoring, function))
    assert {one["metric"] for one in settings["metric_list"]} == {"exact", *FAMILIES}
    assert settings["generation_kwargs"] == {"max_new_tokens": ANSWER_STEPS, "temperature": 0}


def test_the_command_writes_a_task_and_says_how_to_ask_it(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "lab.lmms_eval", "--out", tmp_path, "--per-family", "1")
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"--include_path {tmp_path} --tasks {NAME}\n"
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == len(FAMILIES)


def said(way: Any, texts: tuple[str, ...], correct: tuple[bool, ...], score: float) -> Any:
    ours = PublishedAnswers(way.condition.slug, "endpoint", texts, correct, (17.0,) * 2, (0.0,) * 2)
    return Answers(texts, score, None), ours


def test_a_proof_names_every_answer_and_score_that_differ() -> None:
    theirs, ours = map(list, zip(*(said(way, ("7", "red"), (True, False), 0.5) for way in WAYS), strict=True))
    assert differences(theirs, ours) == []
    theirs[1], theirs[3] = Answers(("7", "blue"), 0.5, 253.0), Answers(("7", "red"), 1.0, None)
    first, second = differences(theirs, ours)
    assert "vllm-plc-server-0.97, document 1: lmms-eval has 'blue', our evaluation 'red'" in first
    assert "crop_oracle-plc-oracle-0.97: lmms-eval's score is 1.0, ours 0.5" in second
    assert table(theirs, ours).row_count == len(WAYS)


def test_ways_have_folders_and_conditions_of_their_own() -> None:
    assert len({way.name for way in WAYS}) == len(WAYS)
    regions = [way.condition.region for way in WAYS]
    assert regions == [None, "server", "server", "oracle", "random"]


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_a_proof_without_lmms_eval_says_what_to_run(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "lab.lmms_eval.proof", "--out", tmp_path)
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert "make lmms-eval" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_lmms_eval_loads_the_task(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    import datasets
    from lmms_eval.tasks import TaskManager, get_task_dict

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    task = get_task_dict([NAME], TaskManager(include_path=str(folder)), "chat")[NAME]
    loaded = list(task.test_docs())
    assert [one["question"] for one in loaded] == [asked.text for _, asked in ASKED]
    check_message(task.doc_to_messages(loaded[0]), *ASKED[0])


def check_message(messages: Any, scene: TestScene, asked: Question) -> None:
    (message,) = messages
    picture, text = message["content"]
    assert ImageChops.difference(picture["url"], scene.picture()).getbbox() is None
    assert (message["role"], text) == ("user", {"type": "text", "text": asked.text})


def test_lmms_eval_finds_the_model_that_sends_boxes() -> None:
    models = pytest.importorskip("lmms_eval.models")
    assert "crop" in entry_points(group="lmms_eval.models").names
    model = models.get_model("crop_oracle")
    assert model.__module__ == "vllm_crop.lmms_eval.oracle"


@pytest.mark.parametrize("settings", [{}, {"additional_config": "{}"}, {"additional_config": {"other": 1}}])
def test_a_model_that_sends_boxes_wants_settings(settings: Any) -> None:
    models = pytest.importorskip("lmms_eval.models")
    with pytest.raises(InvalidConfigError, match=r"additional_config=.*pruning_rate"):
        models.get_model("crop_oracle")(model="no/such/checkpoint", **settings)
