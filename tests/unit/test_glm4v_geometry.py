# SPDX-License-Identifier: Apache-2.0
"""Token grids of GLM-4V against transformers' own image processors, and the settings that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Glm4vImageProcessor, Glm46VImageProcessor
from transformers.models.glm4v.image_processing_glm4v import smart_resize

from vllm_crop.errors import UnsupportedImageError, UnsupportedModelError
from vllm_crop.families.glm4v import Glm4vGeometry, Glm4vResize
from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.planning.geometry import TokenGrid

PROCESSORS = {"GLM-4.1V, 4.5V": Glm4vImageProcessor, "GLM-4.6V": Glm46VImageProcessor}
MODEL: dict[str, Any] = {"architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v"}
sides = st.integers(1, 6000)


@given(
    width=sides,
    height=sides,
    side=st.sampled_from([16, 28, 32]),
    frames=st.integers(1, 4),
    low=st.integers(1, 64),
    data=st.data(),
)
def test_the_grid_is_that_of_smart_resize(
    width: int, height: int, side: int, frames: int, low: int, data: Any
) -> None:
    """Bounds are no whole tokens, and may be no whole frames."""
    assume(max(width, height) <= 200 * min(width, height))
    low = low * frames * side**2 + data.draw(st.integers(0, 99))
    high = data.draw(st.integers(2 * low, 20000 * frames * side**2))
    rows, cols = smart_resize(frames, height, width, frames, side, low, high)
    assert Glm4vResize(side, low, high, frames).grid(width, height) == TokenGrid(rows // side, cols // side)


SETTINGS = [
    {},
    {"size": {"shortest_edge": 12544, "longest_edge": 200704}},
    {"size": {"shortest_edge": 100352, "longest_edge": 401408}},
    {"patch_size": 16, "merge_size": 3, "size": {"shortest_edge": 12544, "longest_edge": 800000}},
    {"temporal_patch_size": 1, "size": {"shortest_edge": 12544, "longest_edge": 200704}},
]


@pytest.mark.parametrize("given_settings", SETTINGS)
@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("as_file", [True, False], ids=["its file", "as loaded"])
@settings(max_examples=15, deadline=None)
@given(width=st.integers(6, 900), height=st.integers(6, 900))
def test_the_grid_is_that_of_the_image_processor(
    given_settings: dict[str, Any], kind: str, as_file: bool, width: int, height: int, tmp_path_factory: Any
) -> None:
    processor = PROCESSORS[kind](**given_settings)
    found = processor.to_dict()
    if as_file:
        folder: Path = tmp_path_factory.mktemp("processor")
        processor.save_pretrained(folder)
        found = json.loads((folder / "preprocessor_config.json").read_text())
    patch, merge = processor.patch_size, processor.merge_size
    resize = Glm4vResize.from_settings(found, patch, merge)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    (_, rows, cols) = processor(image, return_tensors="pt")["image_grid_thw"][0].tolist()
    assert resize.grid(width, height) == TokenGrid(rows // merge, cols // merge)
    assert resize.grid(width, height).num_tokens <= max(resize.max_tokens, 150)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_without_settings_the_defaults_of_transformers_hold(kind: str) -> None:
    loaded = PROCESSORS[kind]().to_dict()
    assert Glm4vResize.from_settings({}, 14, 2) == Glm4vResize.from_settings(loaded, 14, 2)
    assert Glm4vResize.from_settings({}, 14, 2).max_tokens == 7500


def test_images_that_the_image_processor_refuses_are_refused_in_its_words() -> None:
    resize = Glm4vResize.from_settings({}, 14, 2)
    for width, height in ((2020, 10), (1, 201), (6000, 29)):
        with pytest.raises(ValueError, match="absolute aspect ratio") as stock:
            smart_resize(2, height, width)
        with pytest.raises(UnsupportedImageError, match="absolute aspect ratio") as ours:
            resize.grid(width, height)
        assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize(
    ("model", "preprocessor", "message"),
    [
        ({}, {"max_pixels": 401408}, "max_pixels=401408 means nothing to GLM-4V's image processor"),
        ({}, {"min_pixels": 3136}, "min_pixels=3136 means nothing"),
        ({}, {"size": {"longest_edge": 401408}}, "no 'shortest_edge'"),
        ({}, {"do_resize": False}, "do_resize"),
        ({}, {"patch_size": 16}, r"\(16, 2\) are not those of the vision tower, \(14, 2\)"),
        ({}, {"temporal_patch_size": 1}, "temporal_patch_size 1 is not that of the vision tower, 2"),
        ({"vision_config": {"temporal_patch_size": 4}}, {"patch_size": 14}, "temporal_patch_size 2 is not"),
        ({"model_type": "glmga"}, {}, "model_type 'glmga' is not supported, only glm4v, glm4v_moe"),
    ],
)
def test_settings_that_are_not_understood_are_refused(
    model: dict[str, Any], preprocessor: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        geometry_from_configs({**MODEL, **model}, preprocessor)


def test_an_image_processor_ignores_the_names_that_are_refused() -> None:
    """The control: it would make other grids than the Qwen-VL line's does with them."""
    image = torch.zeros(3, 600, 800, dtype=torch.uint8)
    grids = [
        Glm4vImageProcessor(**given)(image, return_tensors="pt")["image_grid_thw"].tolist()
        for given in ({}, {"max_pixels": 50176})
    ]
    assert grids[0] == grids[1]


def test_published_glm_has_a_token_per_28_pixels_and_counts_every_picture_twice() -> None:
    published = {"size": {"shortest_edge": 12544, "longest_edge": 9633792}, "patch_size": 14, "merge_size": 2}
    geometry = geometry_from_configs(MODEL, {**published, "temporal_patch_size": 2})
    assert isinstance(geometry, Glm4vGeometry)
    assert (geometry.num_layers, geometry.first_eviction_layer, geometry.max_tokens) == (40, 1, 6144)
    assert geometry.grid(640, 480) == TokenGrid(17, 23)
    assert geometry.grid(1024, 1024) == TokenGrid(37, 37)
    assert geometry.grid(4000, 4000) == TokenGrid(78, 78)
    assert geometry.grid(40, 20) == TokenGrid(2, 4)
