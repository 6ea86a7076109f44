# SPDX-License-Identifier: Apache-2.0
"""Reading config.json and image processor settings."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoint_json import LLAVA, PROCESSOR, write_json, write_llava
from huggingface_hub.errors import LocalEntryNotFoundError

from vllm_crop.benchmarking.dummy_llava import make_checkpoint
from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.checkpoint import (
    CheckpointFileError,
    load_geometry,
    load_image_processor_settings,
    load_model_config,
)
from vllm_crop.planning.geometry import TokenGrid


def test_geometry_of_a_checkpoint_as_transformers_saves_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    geometry = load_geometry(str(make_checkpoint(tmp_path / "llava", weights=False)))

    assert geometry.grid(640, 480) == TokenGrid(24, 24)
    assert geometry.num_layers == 4


def test_geometry_of_a_checkpoint_as_published(tmp_path: Path) -> None:
    # llava-hf's repositories have both files, the settings in the older one only.
    model = write_json(
        tmp_path, config=LLAVA, preprocessor_config=PROCESSOR, processor_config={"image_token": "<image>"}
    )

    assert load_image_processor_settings(model) == PROCESSOR
    assert load_geometry(model).num_layers == 40


def test_nested_settings_win_as_in_transformers(tmp_path: Path) -> None:
    nested = {**PROCESSOR, "do_pad": True}
    model = write_json(tmp_path, preprocessor_config=PROCESSOR, processor_config={"image_processor": nested})

    assert load_image_processor_settings(model) == nested


@pytest.mark.parametrize(
    ("load", "missing"),
    [(load_model_config, "config.json"), (load_image_processor_settings, "preprocessor_config.json")],
)
def test_a_missing_file_is_named(tmp_path: Path, load: Callable[[str], dict[str, Any]], missing: str) -> None:
    with pytest.raises(CheckpointFileError, match=f"{tmp_path} has no {missing}"):
        load(str(tmp_path))


@pytest.mark.parametrize(("content", "reason"), [("{", "not valid JSON"), ("[1]", "JSON object, not list")])
def test_a_broken_file_is_named(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(CheckpointFileError, match=rf"config\.json.* {reason}"):
        load_model_config(write_json(tmp_path, config=content))


def test_a_text_model_is_refused_for_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        load_geometry(write_json(tmp_path, config={"architectures": ["LlamaForCausalLM"]}))


def test_the_hub_is_asked_for_what_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llava(tmp_path)

    def download(repo_id: str, filename: str) -> str:
        assert repo_id == "llava-hf/llava-1.5-7b-hf"
        if not (tmp_path / filename).exists():
            raise LocalEntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_geometry("llava-hf/llava-1.5-7b-hf").grid(1, 1) == TokenGrid(24, 24)


def test_an_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repo_id: str, filename: str) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointFileError, match="the Hub cannot be reached"):
        load_model_config("someone/somewhere")


def test_a_path_that_does_not_exist_is_said() -> None:
    with pytest.raises(CheckpointFileError, match="neither a directory nor a name on the Hub"):
        load_model_config("/no/such/directory")


def test_reading_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    model = write_llava(tmp_path)
    program = (
        "import sys; from vllm_crop.families.checkpoint import load_geometry; "
        "import vllm_crop.commands.plan, vllm_crop.commands.preview, vllm_crop.commands.check; "
        f"load_geometry({model!r}); print({{'torch', 'transformers', 'vllm'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
