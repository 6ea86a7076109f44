# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop plan --json` prints the plan the server uses: same grid, same tokens, same order."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cpu.conftest import Engine
from tests.pictures import noise_image
from vllm_crop.cli import app

pytestmark = pytest.mark.vllm_runtime

CASES = [
    ((336, 336), [[0.25, 0.375, 0.5, 0.625]], 5 / 6),
    ((640, 480), [[0.54, 0.17, 0.79, 0.42]], 0.889),
    ((480, 640), [[0.0, 0.3, 0.2, 0.5], [0.7, 0.1, 0.9, 0.3]], 0.667),
    ((1000, 200), [[0.45, 0.2, 0.5, 0.9]], 0.5),
    ((1000, 200), [[0.0, 0.2, 0.1, 0.9]], 0.5),
    ((97, 311), [[0.0, 0.0, 1.0, 1.0]], 0.97),
]


@pytest.mark.parametrize("engine_name", ["pool_engine", "original_engine"])
@pytest.mark.parametrize(("size", "boxes", "rate"), CASES)
def test_the_command_prints_the_servers_plan(
    engine_name: str,
    size: tuple[int, int],
    boxes: list[list[float]],
    rate: float,
    request: pytest.FixtureRequest,
) -> None:
    engine: Engine = request.getfixturevalue(engine_name)
    processor = engine.processor
    served = processor(
        "<image>\nhello",
        processor.info.parse_mm_data({"image": noise_image(5, *size)}),
        hf_processor_mm_kwargs={"crop": {"regions": [boxes], "pruning_rate": rate}},
    )
    (item,) = served["mm_kwargs"]["image"]

    options = ["--model", engine.llm.model_config.model, "--image-size", "{}x{}".format(*size), "--json"]
    options += ["--pruning-rate", repr(rate), "--compression", engine.config.compression]
    for box in boxes:
        options += ["--region", ",".join(map(repr, box))]
    printed = CliRunner().invoke(app, ["plan", *options])
    assert printed.exit_code == 0, printed.output
    plan: dict[str, Any] = json.loads(printed.stdout)

    assert served["mm_placeholders"]["image"][0].length == len(plan["embeddings"])
    assignment = item["crop_assignment"].data.tolist()
    if not assignment:  # served whole
        assert [e["tokens"] for e in plan["embeddings"]] == [[token] for token in range(576)]
        return
    assert item["crop_positions"].data.tolist() == [e["position"] for e in plan["embeddings"]]
    for index, embedding in enumerate(plan["embeddings"]):
        assert [token for token, to in enumerate(assignment) if to == index] == embedding["tokens"]
