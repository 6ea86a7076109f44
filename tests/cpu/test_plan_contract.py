# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop plan --json` prints the plan the server uses: same grid, same tokens, same order."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cpu.conftest import EngineOf
from tests.cpu.test_parity import each_family
from tests.families import Family
from tests.pictures import noise_image
from vllm_crop.commands.app import app
from vllm_crop.eviction.markers import embed_indices

pytestmark = pytest.mark.vllm_runtime

CASES = [
    ((336, 336), [[0.25, 0.375, 0.5, 0.625]], 5 / 6),
    ((640, 480), [[0.54, 0.17, 0.79, 0.42]], 0.889),
    ((480, 640), [[0.0, 0.3, 0.2, 0.5], [0.7, 0.1, 0.9, 0.3]], 0.667),
    ((1000, 200), [[0.45, 0.2, 0.5, 0.9]], 0.5),
    ((1000, 200), [[0.0, 0.2, 0.1, 0.9]], 0.5),
    ((97, 311), [[0.0, 0.0, 1.0, 1.0]], 0.97),
]


@each_family
@pytest.mark.parametrize("setting", ["pool", "original", "evicting", "staged"])
@pytest.mark.parametrize(("size", "boxes", "rate"), CASES)
def test_the_command_prints_the_servers_plan(
    engine_of: EngineOf,
    family: Family,
    setting: str,
    size: tuple[int, int],
    boxes: list[list[float]],
    rate: float,
) -> None:
    engine = engine_of(family, setting)
    config, processor = engine.config, engine.processor
    rate = min(rate, 0.7) if config.stages else rate  # what "ilp" can still meet with layer 2 of 8
    served = processor(
        f"{engine.image}\nhello",
        processor.info.parse_mm_data({"image": noise_image(5, *size)}),
        hf_processor_mm_kwargs={"crop": {"regions": [boxes], "pruning_rate": rate}},
    )
    (item,) = served["mm_kwargs"]["image"]

    options = ["--model", engine.llm.model_config.model, "--image-size", "{}x{}".format(*size), "--json"]
    options += ["--pruning-rate", repr(rate), "--compression", config.compression]
    options += ["--method", config.method]
    if config.stages:
        options += ["--eviction-layers", ",".join(map(str, config.stages))]
    for box in boxes:
        options += ["--region", ",".join(map(repr, box))]
    printed = CliRunner().invoke(app, ["plan", *options])
    assert printed.exit_code == 0, printed.output
    plan: dict[str, Any] = json.loads(printed.stdout)

    (placeholder,) = served["mm_placeholders"]["image"]
    takes = embed_indices(placeholder)
    assert len(takes) == len(plan["embeddings"])
    if "image_grid_thw" in item:
        rows, cols = plan["grid"]
        assert item["image_grid_thw"].data.tolist() == [1, 2 * rows, 2 * cols]
    ids = [served["prompt_token_ids"][place] for place in takes]
    settings, hf_processor = processor.eviction_settings, processor.info.get_hf_processor()
    image_token_id = getattr(hf_processor, "ctx_image_token_id", None) or hf_processor.image_token_id
    stage_of = {None: 0, **{layer: stage for stage, layer in enumerate(settings.stages, start=1)}}
    leaves_at = [stage_of[e["evicted_from_layer"]] for e in plan["embeddings"]]
    assert ids == [settings.marker_ids[stage - 1] if stage else image_token_id for stage in leaves_at]
    assignment = item["crop_assignment"].data.tolist()
    if not assignment:  # not compressed, so vLLM's own count
        assert [e["tokens"] for e in plan["embeddings"]] == [[token] for token in range(len(takes))]
        return
    assert item["crop_positions"].data.tolist() == [e["position"] for e in plan["embeddings"]]
    for index, embedding in enumerate(plan["embeddings"]):
        assert [token for token, to in enumerate(assignment) if to == index] == embedding["tokens"]
