# SPDX-License-Identifier: Apache-2.0
"""Limits, budgets, the localizer's view, room for positions and KV groups at published sizes, no weights."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cpu.conftest import inspect_models_here
from tests.families import (
    FAMILIES,
    GLM4V,
    GLM4V_MOE,
    INTERNVL,
    INTERNVL_CHAT,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    LLAVA_SIGLIP,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    UNPUBLISHED,
    Family,
)
from tests.published import PUBLISHED
from vllm_crop.crop_params import CropParams
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.eviction.report import recommended_layer
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.families.view_size import size_for_tokens
from vllm_crop.planning.budget import BudgetError, retained_per_stage
from vllm_crop.request import CropRequest

pytestmark = pytest.mark.vllm_runtime
each_family = pytest.mark.parametrize("family", PUBLISHED, ids=str)
SIZES = ((336, 336), (640, 480), (1280, 720), (3840, 2160), (300, 1500), (4000, 500))
BOX = [0.4, 0.4, 0.6, 0.6]
THUMBNAIL = 64  # tokens, the localizer's default
BLOCK_SIZE = 16  # on a GPU
# Visual tokens of an image of 1280x720, of 3840x2160, and of the largest; vLLM is asked below.
TOKENS = {
    LLAVA: (576, 576, 576),
    LLAVA_SIGLIP: (729, 729, 729),
    LLAVA_NEXT: (1948, 1948, 2928),
    LLAVA_ONEVISION: (5967, 7317, 8829),
    QWEN2_VL: (1196, 10549, 16384),
    QWEN2_5_VL: (1196, 10549, 16384),
    QWEN3_VL: (880, 8160, 16384),
    QWEN3_VL_MOE: (880, 8160, 16384),
    QWEN3_5: (880, 8160, 16384),
    QWEN3_5_MOE: (880, 8160, 16384),
    INTERNVL: (2304, 2304, 3328),
    INTERNVL_CHAT: (2304, 2304, 3328),
    MISTRAL3: (46 * 26 + 25, 55 * 31 + 30, 55 * 55 + 54),  # with breaks
    GLM4V: (1196, 6032, 6144),
    GLM4V_MOE: (1196, 6032, 6144),
}
README = (Path(__file__).parents[2] / "README.md").read_text()
ServerOf = Callable[[Family], SimpleNamespace]


@pytest.fixture(scope="module")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> ServerOf:
    """What a server with this checkpoint decides with: its processor, and the checkpoint's folder."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    inspect_models_here()

    @cache
    def of(family: Family) -> SimpleNamespace:
        published = PUBLISHED[family]
        folder = published.write(family, tmp_path_factory.mktemp(str(family)))
        layers = load_geometry(str(folder)).num_layers
        crop = {"method": "plc+ilp", "eviction_layers": [recommended_layer(layers, 3)]}
        longest = min(32768, published.text["max_position_embeddings"])
        arguments = EngineArgs(
            model=str(folder), additional_config={"crop": crop}, max_model_len=longest, **family.options
        )
        model_config = arguments.create_model_config()
        processor = MULTIMODAL_REGISTRY.create_processor(model_config)
        return SimpleNamespace(folder=folder, processor=processor, longest=longest)

    return of


@each_family
def test_images_have_as_many_tokens_as_vllm_says(server_of: ServerOf, family: Family) -> None:
    server = server_of(family)
    geometry, info = server.processor.geometry, server.processor.info
    hd, uhd, most = TOKENS[family]
    assert geometry.grid(1280, 720).num_tokens == hd
    assert geometry.grid(3840, 2160).num_tokens == uhd
    assert geometry.max_tokens == most
    if family is not MISTRAL3:  # upstream has no such method there
        assert most >= info.get_max_image_tokens()
    assert geometry == load_geometry(str(server.folder))
    counted = [
        info.get_num_image_tokens(image_width=width, image_height=height, **_options(info))
        for width, height in SIZES
    ]
    grids = [geometry.grid(*size) for size in SIZES]
    takes = [server.processor.unpruned_assignment(grid) for grid in grids]
    assert counted == [
        grid.num_tokens if assignment is None else int((assignment >= 0).sum())
        for grid, assignment in zip(grids, takes, strict=True)
    ]


def _options(info: Any) -> dict[str, Any]:
    """Arguments that some of vLLM's count with."""
    if "Intern" in type(info).__name__:
        processor = {"processor": info.get_hf_processor()}
        chats = "InternVL" in type(info).__name__
        return processor if chats else {**processor, "mm_kwargs": {"crop_to_patches": True}}
    if not hasattr(info, "get_image_processor") or "Qwen" not in type(info).__name__:
        return {}
    return {"image_processor": info.get_image_processor(), "mm_kwargs": {}}


@each_family
def test_every_budget_is_met_at_every_size(server_of: ServerOf, family: Family) -> None:
    server = server_of(family)
    planner = server.processor.planner
    for size in SIZES:
        for rate in (0.5, 0.889, 0.96):
            asked = CropRequest(CropParams.parse({"regions": [BOX], "pruning_rate": rate}))
            (decision,) = planner.plan(asked, [size])
            assert decision.plan is not None, (size, rate)
            tokens = decision.plan.grid.num_tokens
            average = decision.plan.tokens_avg(planner.geometry.num_layers)
            assert abs(average - max(1.0, tokens * (1 - rate))) <= 0.5, (size, rate)


@each_family
def test_no_image_takes_more_positions_than_unpruned(server_of: ServerOf, family: Family) -> None:
    """So a prompt that fits unpruned fits pruned, whatever is left of its images."""
    server = server_of(family)
    planner, geometry = server.processor.planner, server.processor.geometry
    assert (server.processor.positions is not None) == geometry.uses_mrope
    for size in (*SIZES, (6000, 6000), (28 * 190, 28)):
        asked = CropRequest(CropParams.parse({"regions": [[0.0, 0.0, 0.9, 0.9]], "pruning_rate": 0.99}))
        (decision,) = planner.plan(asked, [size])
        assert decision.plan is not None
        taken = decision.plan.num_embeddings + decision.mrope_position_delta
        assert taken <= decision.plan.grid.num_tokens


@each_family
def test_the_localizer_looks_at_a_small_view(server_of: ServerOf, family: Family) -> None:
    geometry = server_of(family).processor.geometry
    for width, height in SIZES:
        size = size_for_tokens(geometry, width, height, THUMBNAIL)
        if family in (LLAVA, LLAVA_SIGLIP, LLAVA_NEXT, LLAVA_ONEVISION, INTERNVL, INTERNVL_CHAT):
            assert size is None  # a smaller image costs as much, so it is averaged
            continue
        assert size is not None
        # The least that Qwen3-VL's image processor makes of an image that is not square.
        at_most = 72 if PUBLISHED[family].processor is PUBLISHED[QWEN3_VL].processor else THUMBNAIL
        assert geometry.grid(*size).num_tokens <= at_most
        assert abs(math.log(size[0] / size[1] * height / width)) < 0.5


@each_family
def test_the_recommended_layer_makes_groups_without_much_padding(server_of: ServerOf, family: Family) -> None:
    geometry = server_of(family).processor.geometry
    layer = recommended_layer(geometry.num_layers, geometry.first_eviction_layer)
    grouping = predict_grouping(geometry.num_layers, (layer,), BLOCK_SIZE, geometry.looking_layers)
    size = max(group.num_layers for group in grouping.groups)
    assert size * len(grouping.groups) <= 1.2 * geometry.num_layers
    for rate in (0.667, 0.778, 0.889):
        try:
            counts = retained_per_stage(geometry.max_tokens, rate, "plc+ilp", geometry.num_layers, (layer,))
        except BudgetError:
            pytest.fail(f"{rate} cannot be met from layer {layer} on")
        assert counts[0] > counts[1] > 0


@each_family
def test_readme_says_what_a_megapixel_costs(server_of: ServerOf, family: Family) -> None:
    name, planner = PUBLISHED[family].name, server_of(family).processor.planner
    (row,) = [
        line
        for line in README.splitlines()
        if line.startswith("| ") and name in line.split(" | ")[0][2:].split(", ")
    ]
    whole, *counts = (int(cell.strip(" |").replace(",", "")) for cell in row.split(" | ")[1:])
    assert planner.geometry.grid(1024, 1024).num_tokens == whole
    for rate, count in zip((0.667, 0.778, 0.889), counts, strict=True):
        crop = {"regions": [[0.3, 0.3, 0.5, 0.5]], "pruning_rate": rate, "method": "plc"}
        (decision,) = planner.plan(CropRequest(CropParams.parse(crop)), [(1024, 1024)])
        assert decision.plan.num_embeddings == count


def test_every_family_is_published() -> None:
    assert set(PUBLISHED) == set(FAMILIES).difference(UNPUBLISHED) == set(TOKENS)
