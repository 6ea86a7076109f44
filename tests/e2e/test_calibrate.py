# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop calibrate` as a user runs it on the trained model, and a server with what it has learned."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lab.evaluation.question_file import write_questions
from lab.evaluation.questions import make_test_set
from tests.conftest import STARTS
from tests.e2e.conftest import ENVIRONMENT, OPTIONS, serve
from tests.tinyvqa import CHECKPOINT, ask, crop_options, found
from vllm_crop.measuring.server import Server
from vllm_crop.planning.geometry import Box, Region, TokenGrid

pytestmark = pytest.mark.e2e

PROGRAM = (sys.executable, "-c", "from vllm_crop.commands.app import app; app()", "calibrate")
TAUGHT = {3, 7}  # layers of this model that were supervised to look at what is asked for
SERVE_ARGS = "--dtype float32 --max-model-len 2048 --block-size 32 --enforce-eager"
# Of scenes that it was not calibrated on.
LOCAL = [(scene, q) for scene in make_test_set(2, seed=77) for q in scene.questions if q.boxes]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrate")
    data, out = write_questions(folder / "data", 8, seed=41), folder / "tinyvqa.json"
    settings = {"prompt": "{question}", "thumbnail_tokens": 64}
    STARTS["engines"] += 1
    finished = subprocess.run(
        (
            *(*PROGRAM, "--model", str(CHECKPOINT), "--data", str(data), "--out", str(out)),
            *("--localizer-config", json.dumps(settings), "--view-tokens", "144", "--serve-args", SERVE_ARGS),
            *("--engine", "cells", "--engine-prompt", "where:{question}", "--fit"),
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "160", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out, finished.stdout


@pytest.fixture(scope="module")
def server(calibrated: tuple[Path, str], logs: Path) -> Iterator[Server]:
    # What is set beside the file wins: a threshold of so few questions is rough.
    own = {"whole_below": 0.0, "timeout_s": 60}
    crop = crop_options({"kind": "attention", "calibration": str(calibrated[0]), **own})
    with serve(str(CHECKPOINT), *crop, *OPTIONS, log_path=logs / "calibrated.log") as running:
        yield running


def test_the_layers_that_were_taught_to_look_are_found(calibrated: tuple[Path, str]) -> None:
    learned = json.loads(calibrated[0].read_text())
    change = {int(layer): much for layer, much in learned["scores"]["question_change"].items()}
    assert set(sorted(change, key=change.__getitem__)[-2:]) == TAUGHT
    assert set(learned["scores"]["chosen"]) >= TAUGHT
    rates = {name: row["hit"]["share"] for name, row in learned["scores"]["rows"].items()}
    assert min(rates["chosen layers"], rates["fitted weights"]) > 0.9
    assert rates["the model says it, cells"] > 0.9
    assert max(rates["centre"], rates["random place"]) < 0.3
    by_layer = {int(layer): row["hit"]["share"] for layer, row in learned["scores"]["by_layer"].items()}
    assert min(by_layer[layer] for layer in TAUGHT) > 0.9
    assert by_layer[2] < 0.6


def test_weights_are_those_of_the_taught_layers(calibrated: tuple[Path, str]) -> None:
    settings = json.loads(calibrated[0].read_text())["settings"]
    weights = dict(zip(settings["layers"], settings["weights"], strict=True))
    assert len(weights) == 12
    assert set(sorted(weights, key=weights.__getitem__)[-2:]) == TAUGHT


def test_it_says_what_it_rests_on(calibrated: tuple[Path, str]) -> None:
    out, printed = calibrated
    learned = json.loads(out.read_text())
    assert learned["model"]["num_hidden_layers"] == 12
    assert learned["provenance"]["versions"]["vllm-crop"]
    assert sum(learned["provenance"]["questions"].values()) == 40
    assert "n " in printed
    assert str(out) in printed
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_server_finds_regions_with_it(server: Server, calibrated: tuple[Path, str]) -> None:
    layers = json.loads(calibrated[0].read_text())["settings"]["layers"]
    assert f"layers={layers}" in server.log_path.read_text()
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
    tokens, covered = TokenGrid(24, 24), []
    for scene, question in LOCAL:
        image: Any = found(ask(client, scene.picture(), question.text))
        assert (image["source"], image["localizer"]["outcome"]) == ("attention", "region")
        have, need = Region(tuple(Box(*box) for box in image["region"])), question.region(8)
        covered.append((tokens.mask(have) & tokens.mask(need)).sum() / tokens.mask(need).sum())
    assert sum(covered) / len(covered) > 0.7
