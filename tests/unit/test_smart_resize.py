# SPDX-License-Identifier: Apache-2.0
"""Token grids of Qwen-VL against transformers' own image processor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vllm_crop.errors import UnsupportedImageError, UnsupportedModelError
from vllm_crop.families.qwen_vl import SmartResize
from vllm_crop.planning.geometry import TokenGrid

sides = st.integers(1, 6000)


@given(width=sides, height=sides, side=st.sampled_from([16, 28, 32]), low=st.integers(1, 64), data=st.data())
def test_the_grid_is_that_of_smart_resize(width: int, height: int, side: int, low: int, data: Any) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    low *= side**2
    high = data.draw(st.integers(2 * low, 20000 * side**2))
    rows, cols = smart_resize(height, width, side, low, high)
    assert SmartResize(side, low, high).grid(width, height) == TokenGrid(rows // side, cols // side)


SETTINGS = [
    {},
    {"min_pixels": 50176, "max_pixels": 200704},
    {"size": {"shortest_edge": 3136, "longest_edge": 100352}},
    {"size": {"shortest_edge": 3136, "longest_edge": 100352}, "max_pixels": 50176},
    {"patch_size": 8},
    {"patch_size": 16, "merge_size": 3, "max_pixels": 400000},
]


@pytest.mark.parametrize("given_settings", SETTINGS)
@pytest.mark.parametrize("as_file", [True, False], ids=["its file", "as loaded"])
@settings(max_examples=15, deadline=None)
@given(width=st.integers(20, 900), height=st.integers(20, 900))
def test_the_grid_is_that_of_the_image_processor(
    given_settings: dict[str, Any], as_file: bool, width: int, height: int, tmp_path_factory: Any
) -> None:
    processor = Qwen2VLImageProcessor(**given_settings)
    found = processor.to_dict()
    if as_file:
        folder: Path = tmp_path_factory.mktemp("processor")
        processor.save_pretrained(folder)
        found = json.loads((folder / "preprocessor_config.json").read_text())
    patch, merge = processor.patch_size, processor.merge_size
    ours = SmartResize.from_settings(found, patch, merge).grid(width, height)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    (_, rows, cols) = processor(image, return_tensors="pt")["image_grid_thw"][0].tolist()
    assert ours == TokenGrid(rows // merge, cols // merge)
    assert ours.num_tokens <= max(SmartResize.from_settings(found, patch, merge).max_tokens, 45)


def test_settings_of_published_files_are_those_of_the_loaded_processor() -> None:
    published = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    loaded = Qwen2VLImageProcessor(**published).to_dict()
    assert SmartResize.from_settings(published, 14, 2) == SmartResize.from_settings(loaded, 14, 2)


def test_without_settings_the_defaults_of_transformers_hold() -> None:
    loaded = Qwen2VLImageProcessor().to_dict()
    assert SmartResize.from_settings({}, 14, 2) == SmartResize.from_settings(loaded, 14, 2)


def test_images_that_the_image_processor_refuses_are_refused_in_its_words() -> None:
    resize = SmartResize.from_settings({}, 14, 2)
    resize.grid(200, 1)
    with pytest.raises(ValueError, match="absolute aspect ratio") as stock:
        smart_resize(1, 201)
    with pytest.raises(UnsupportedImageError, match="absolute aspect ratio") as ours:
        resize.grid(201, 1)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"size": {"shortest_edge": 3136}}, "no 'longest_edge'"),
        ({"size": {"height": 336, "width": 336}}, "no 'shortest_edge'"),
        ({"patch_size": 16}, r"\(16, 2\) are not those of the vision tower, \(14, 2\)"),
    ],
)
def test_settings_that_are_not_understood_are_refused(found: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        SmartResize.from_settings(found, 14, 2)
