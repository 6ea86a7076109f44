# SPDX-License-Identifier: Apache-2.0
"""A server configured by a YAML file alone: two tensor-parallel workers, the shared-memory image cache,
no API key, sampling to 64 tokens."""

import os
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import OPTIONS, metric, serve
from tests.e2e.test_serve import FIRST, SECOND, SQUARE, chat, expected
from tests.reference import HfLlava
from vllm_crop.client import facts_of

pytestmark = pytest.mark.e2e

SETTINGS = """
plugin: crop
crop-config:
  pruning_rate: 0.889
  compression: prune
tensor-parallel-size: 2
mm-processor-cache-type: shm
"""


def test_two_workers_configured_by_a_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(SETTINGS)
    log_path = tmp_path / "server.log"
    cores = sorted(os.sched_getaffinity(0))[:2]
    one_core_each = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores)}
    options = ("--config", str(file), *OPTIONS)
    hf = HfLlava(checkpoint)
    with serve(str(checkpoint), *options, log_path=log_path, env=one_core_each) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
        for regions in ([FIRST], [SECOND], [FIRST, SECOND], [FIRST]):
            images = [SQUARE] * len(regions)
            response = chat(client, images, {"regions": [region.as_lists() for region in regions]})
            text, num_prompt_tokens = expected(hf, images, regions, rate=0.889, compression="prune")
            completion = response.parse()
            assert facts_of(response.headers)["tokens_after_plc"] == 64 * len(regions)
            assert completion.usage.prompt_tokens == num_prompt_tokens
            assert completion.choices[0].message.content == text
        assert metric(server, "crop:visual_tokens_retained_total") == 5 * 64
    assert "Traceback" not in log_path.read_text()
