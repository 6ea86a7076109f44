# SPDX-License-Identifier: Apache-2.0
"""The file of a calibration: read by a server, refused where it does not fit, judged by `check`."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_json import QWEN2_5_VL, QWEN3_VL, write_qwen2_5_vl, write_qwen3_vl

from vllm_crop.compat.diagnosis import judge_settings
from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError, InvalidConfigError
from vllm_crop.families.model_shape import ModelShape
from vllm_crop.families.text_layers import full_attention_layers
from vllm_crop.localizers.calibration import Calibration, CalibrationError, with_calibration

SETTINGS = {"layers": [11, 14], "prompt": "{question} briefly", "whole_below": 0.21, "thumbnail_tokens": 144}


def calibration(**changes: Any) -> dict[str, Any]:
    made = Calibration(
        settings=SETTINGS,
        model_name="Qwen/Qwen2.5-VL-7B-Instruct",
        model=ModelShape.of(QWEN2_5_VL),
        provenance={"date": "2026-01-01"},
    )
    return {**made.model_dump(), **changes}


def write(folder: Path, content: Any) -> str:
    path = folder / "calibration.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def crop(path: str, **localizer: Any) -> dict[str, Any]:
    return {"pruning_rate": 0.5, "localizer": {"kind": "attention", "calibration": path, **localizer}}


def test_a_server_takes_what_the_file_says(tmp_path: Path) -> None:
    settings, found = with_calibration(crop(write(tmp_path, calibration())))
    assert found is not None
    config = CropConfig.from_mapping(settings)
    localizer = config.localizer
    assert config.pruning_rate == 0.5
    assert (localizer.layers, localizer.prompt) == ([11, 14], "{question} briefly")
    assert (localizer.least_confidence, localizer.view_tokens(10_000)) == (0.21, 144)
    # A worker reads no file: what it gets says it all.
    (tmp_path / "calibration.json").unlink()
    assert CropConfig.from_mapping(config.model_dump()) == config


def test_what_the_operator_sets_wins(tmp_path: Path) -> None:
    settings, _ = with_calibration(crop(write(tmp_path, calibration()), layers=[3], whole_below=0.5))
    localizer = CropConfig.from_mapping(settings).localizer
    assert (localizer.layers, localizer.whole_below, localizer.thumbnail_tokens) == ([3], 0.5, 144)


def test_weights_belong_to_the_layers_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, calibration(settings={"layers": [3, 7], "weights": [0.9, 1.1]}))
    localizer = CropConfig.from_mapping(with_calibration(crop(path))[0]).localizer
    assert (localizer.layers, localizer.weights) == ([3, 7], [0.9, 1.1])
    localizer = CropConfig.from_mapping(with_calibration(crop(path, layers=[3]))[0]).localizer
    assert (localizer.layers, localizer.weights) == ([3], None)


def test_without_a_file_nothing_changes() -> None:
    settings = {"localizer": {"kind": "attention", "layers": [3]}}
    assert with_calibration(settings) == (settings, None)
    assert with_calibration({}) == ({}, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no JSON"),
        ("[1]", "is no calibration of this version"),
        ({}, "is no calibration of this version (settings: Field required)"),
        (calibration(version=2), "is no calibration of this version (version: "),
        (calibration(more=1), "is no calibration of this version (more: "),
        (calibration(settings={"layers": ["a"]}), "is no calibration of this version (layers.0: "),
        (calibration(settings={"layers": [-1]}), "is no calibration of this version (layers.0: "),
        (calibration(settings={**SETTINGS, "timeout_s": 1.0}), "(settings: timeout_s)"),
        (calibration(settings={}), "(settings: no layers)"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_by_name_with_what_to_do(tmp_path: Path, content: Any, reason: str) -> None:
    path = str(tmp_path / "calibration.json") if content is None else write(tmp_path, content)
    with pytest.raises(CalibrationError) as caught:
        with_calibration(crop(path))
    said = str(caught.value)
    assert reason in said
    assert f"localizer.calibration {path}" in said
    assert "vllm-crop calibrate --model M" in said


@pytest.mark.parametrize(
    "wrong",
    [{"weights": [1.0]}, {"layers": [3], "weights": [1.0, 2.0]}, {"layers": [3, 2], "weights": [1.0, 2.0]}],
)
def test_weights_need_their_layers(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="one weight for each"):
        CropConfig.from_mapping({"localizer": {"kind": "attention", **wrong}})


def test_it_belongs_to_kind_attention() -> None:
    with pytest.raises(InvalidConfigError, match="belongs to localizer\\.kind 'attention'"):
        CropConfig.from_mapping({"localizer": {"kind": "engine", "calibration": "file.json"}})


class TestFit:
    found = Calibration.model_validate(calibration())

    def test_the_model_it_was_made_for(self) -> None:
        self.found.require_fit("file.json", QWEN2_5_VL)
        # A loaded configuration: nested, our own name for the architecture, defaults filled in.
        text = {"num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28}
        loaded = {
            **QWEN2_5_VL,
            "architectures": ["CropQwen2_5_VLForConditionalGeneration"],
            "text_config": text,
        }
        self.found.require_fit("file.json", loaded)

    def test_another_family(self) -> None:
        with pytest.raises(CalibrationError) as caught:
            self.found.require_fit("file.json", QWEN3_VL)
        said = str(caught.value)
        assert "file.json was made for another model, Qwen/Qwen2.5-VL-7B-Instruct" in said
        assert "architecture Qwen3VLForConditionalGeneration, not Qwen2_5_VLForConditionalGeneration" in said
        assert "num_hidden_layers 36, not 28" in said
        assert "Run `vllm-crop calibrate" in said

    def test_another_size_of_the_same_family(self) -> None:
        with pytest.raises(CalibrationError, match="num_hidden_layers 36, not 28"):
            self.found.require_fit("file.json", {**QWEN2_5_VL, "num_hidden_layers": 36})


class TestCheck:
    def test_says_that_it_fits(self, tmp_path: Path) -> None:
        path = write(tmp_path, calibration())
        found = judge_settings(json.dumps(crop(path, whole_below=0.4)), write_qwen2_5_vl(tmp_path))[
            "calibration"
        ]
        assert found is not None
        assert found["fits"].startswith("yes")
        assert found["made for"] == "Qwen/Qwen2.5-VL-7B-Instruct"
        assert json.loads(found["settings"])["layers"] == [11, 14]
        assert json.loads(found["settings"])["whole_below"] == 0.4

    def test_says_that_it_does_not(self, tmp_path: Path) -> None:
        path = write(tmp_path, calibration())
        with pytest.raises(CalibrationError, match="made for another model"):
            judge_settings(json.dumps(crop(path)), write_qwen3_vl(tmp_path))

    def test_without_a_model_nothing_is_compared(self, tmp_path: Path) -> None:
        found = judge_settings(json.dumps(crop(write(tmp_path, calibration()))), None)["calibration"]
        assert found is not None
        assert "give --model" in found["fits"]
        assert judge_settings("{}", None) == {}

    @pytest.mark.parametrize("wrong", ["{", "[]", '{"localizer": {"layer": 3}}'])
    def test_wrong_settings_are_named(self, wrong: str) -> None:
        with pytest.raises(CropError):
            judge_settings(wrong, None)


def test_layers_without_full_attention_are_left_out() -> None:
    kinds = ["linear_attention", "full_attention", "sliding_attention", "full_attention"]
    assert full_attention_layers({"text_config": {"layer_types": kinds}}, 4) == [1, 3]
    assert full_attention_layers({"layer_types": ["linear_attention"] * 3}, 3) == []
    assert full_attention_layers({"text_config": {}}, 3) == [0, 1, 2]
