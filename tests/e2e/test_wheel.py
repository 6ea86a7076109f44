# SPDX-License-Identifier: Apache-2.0
"""The built wheel with nothing but its declared dependencies around it: no vLLM, no torch, no checkout."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
COMMANDS = ("check", "plan", "preview", "compare", "calibrate", "bench", "eval")
SIZE = ("--image-size", "640x480", "--region", "0.5,0.1,0.8,0.4")

pytestmark = pytest.mark.package_index


def run(*command: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program that sees neither the checkout nor the packages of this interpreter."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "VLLM_PLUGINS")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder)
    built = run(*pip, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("vllm_crop-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of a new environment that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--constraint", ROOT / "constraints.txt")
    finished = run(*pip, wheel, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `plan` needs of LLaVA-1.5's checkpoint."""
    folder = tmp_path_factory.mktemp("llava")
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"num_hidden_layers": 32},
        "vision_config": {"image_size": 336, "patch_size": 14},
    }
    processor = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_the_description_links_to_nothing_that_an_index_page_lacks(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    description = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert isinstance(description, str)
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets, "not even the paper's"
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "![" not in description
    assert re.search(r"<img|<a |^\[[^\]]+\]:", description, re.MULTILINE) is None
    assert "What it saves" in description.split("## Supported")[0], "the rest of README is there"


def test_the_environment_has_neither_vllm_nor_torch(installed: Path) -> None:
    for name in ("vllm", "torch", "transformers", "openai", "matplotlib"):
        assert (
            "ModuleNotFoundError" in run(installed / "python", "-c", f"import {name}", cwd=installed).stderr
        )


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(installed: Path, command: str) -> None:
    finished = run(installed / "vllm-crop", *command.split(), "--help", cwd=installed)
    assert finished.returncode == 0, finished.stderr
    assert "Usage: vllm-crop" in finished.stdout


@pytest.mark.parametrize("method", ["plc", "ilp", "plc+ilp"])
def test_plan_and_preview_work(installed: Path, model: Path, tmp_path: Path, method: str) -> None:
    options = ("--model", model, "--pruning-rate", "0.889", "--method", method)
    planned = run(installed / "vllm-crop", "plan", *options, *SIZE, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["grid"], len(plan["tokens_per_layer"])) == ([24, 24], 32)
    assert sum(plan["tokens_per_layer"]) / 32 == pytest.approx(64, abs=1)
    Image.new("RGB", (640, 480), "white").save(tmp_path / "photo.png")
    region = ("--region", "0.5,0.1,0.8,0.4", "-o", "out.png")
    drawn = run(installed / "vllm-crop", "preview", "photo.png", *options, *region, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "out.png") as drawing:
        assert min(drawing.size) > 400


def test_check_says_that_vllm_is_missing(installed: Path, model: Path) -> None:
    finished = run(installed / "vllm-crop", "check", "--model", model, cwd=installed)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert "vllm is not installed" in finished.stdout
    assert "576 tokens for an image of 640x480" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "packages"),
    [
        (("bench",), "'vllm-crop[vllm]'"),
        (("bench", "--decode"), "'vllm-crop[vllm]'"),
        (("calibrate", "--model", "M"), "'vllm-crop[vllm]'"),
        (("compare", "--base-url", "http://localhost:1/v1", "--data", "."), "'vllm-crop[openai]'"),
    ],
)
def test_what_cannot_run_says_in_a_sentence_what_to_install(
    installed: Path, arguments: tuple[str, ...], packages: str
) -> None:
    finished = run(installed / "vllm-crop", *arguments, cwd=installed)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert f"pip install {packages}" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_what_needs_the_repository_says_so(installed: Path) -> None:
    finished = run(installed / "vllm-crop", "eval", "--quick", cwd=installed)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "python -m lab.evaluation" in finished.stderr


def test_the_wheel_has_no_laboratory_and_no_results(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "vllm_crop",
        "vllm_crop_server",
        "vllm_crop-0.1.0.dist-info",
    }
    suspicious = re.compile(r"lab/|results|tinyvqa|rivals|safetensors|checkpoints?/")
    assert [name for name in names if suspicious.search(name)] == []
    # What `bench` serves; those of other families are the tests'.
    dummies = {Path(name).stem for name in names if "dummy" in name}
    assert dummies == {
        "dummy_internvl",
        "dummy_llava",
        "dummy_llava_next",
        "dummy_qwen2_5_vl",
        "dummy_qwen3_5",
    }


def test_asking_a_server_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    asked = ("preview", "photo.png", "What is this?", "--base-url", "http://localhost:1/v1")
    finished = run(installed / "vllm-crop", *asked, cwd=tmp_path)
    assert finished.returncode == 2
    assert "pip install 'vllm-crop[openai]'" in finished.stderr
    assert "Traceback" not in finished.stderr
