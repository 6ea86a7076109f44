# SPDX-License-Identifier: Apache-2.0
"""A server configured by a YAML file alone: one API process, no key, sampling to 64 tokens."""

import json
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import MODEL, OPTIONS, data_url, metric
from tests.pictures import noise_image
from vllm_crop.benchmarking.server import serve

pytestmark = pytest.mark.e2e


def test_plugin_and_settings_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("plugin: crop\ncrop-config:\n  pruning_rate: 0.889\n  compression: prune\n")
    log_path = tmp_path / "server.log"
    with serve(str(checkpoint), "--config", str(file), *OPTIONS, log_path=log_path) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(noise_image(80))}},
            {"type": "text", "text": "What is it?"},
        ]
        response = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
            max_tokens=2,
            extra_body={"crop": {"regions": [[0.2, 0.2, 0.5, 0.5]]}},
        )
        assert json.loads(response.headers["x-crop-facts"])["tokens_after_plc"] == 64
        assert metric(server, "crop:visual_tokens_retained_total", model_name=MODEL) == 64
    assert "Traceback" not in log_path.read_text()
