# SPDX-License-Identifier: Apache-2.0
"""A server configured by a YAML file alone: two tensor-parallel workers, the shared-memory image cache,
no API key, sampling to 64 tokens, regions where the model looks."""

import os
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.e2e.conftest import OPTIONS, metric, serve
from tests.e2e.test_serve import FIRST, SECOND, SQUARE, TEXT, chat, expected
from tests.reference import HfLlava
from vllm_crop.client import facts_of
from vllm_crop.heat.request import NOWHERE
from vllm_crop.localizers.heat import HeatMap, heat_grid
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.planning.geometry import Region

pytestmark = pytest.mark.e2e

SETTINGS = """
plugin: crop
crop-config:
  pruning_rate: 0.889
  compression: prune
  localizer: {kind: attention, layers: [0, 1], prompt: "{question}", whole_below: 0, timeout_s: 60}
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
        # Each worker sees some of the heads: together they look where the whole model does.
        wanted, confidence = looked_at(hf, [0, 1])
        for _ in range(2):  # alone, and as it is remembered
            (image,) = facts_of(chat(client, [SQUARE]).headers)["images"]
            assert image["source"] == "attention"
            assert image["region"] == [[pytest.approx(side) for side in box] for box in wanted.as_lists()]
            assert image["localizer"]["confidence"] == pytest.approx(confidence, abs=1e-4)
            assert image["tokens_after_plc"] == 64
        assert looked_at(hf, [0])[1] != pytest.approx(confidence, abs=1e-4)
        # Before it is stopped: a worker may complain of a leader that is gone.
        assert "Traceback" not in log_path.read_text()


def looked_at(hf: HfLlava, layers: list[int]) -> tuple[Region, float]:
    """Region and confidence that transformers' attention gives, by the rule of docs/localization.md."""
    settings = LocalizerConfig(kind="attention")
    full = hf.geometry.grid(*SQUARE.size)
    count = settings.view_tokens(full.num_tokens)
    view = hf.plan(SQUARE, Region.whole(), 1 - count / full.num_tokens, "prune")
    assert view is not None
    ids = hf.processor.tokenizer.encode(f"USER: {hf.image}\n{TEXT}\nASSISTANT:", add_special_tokens=False)
    start = ids.index(hf.image_token_id)
    grid = heat_grid(full, view.assignment)
    where = np.array(grid.cells)
    attention = hf.attention(hf.embed(ids, [SQUARE], [view]))[layers, start : start + count].numpy()
    heat = (attention / attention[:, where != NOWHERE].sum(-1, keepdims=True)).max(0)
    cells = [heat[where == cell].mean() if (where == cell).any() else 0 for cell in range(grid.num_cells)]
    found = HeatMap.of(grid, np.array(cells))
    region = found.region(settings.window, settings.max_windows, settings.further_window)
    shown = hf.geometry.view(*SQUARE.size).unproject(region)
    assert shown is not None
    return shown, found.within(region)
