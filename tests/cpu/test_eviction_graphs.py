# SPDX-License-Identifier: Apache-2.0
"""What only CUDA runs, as far as a CPU can show it: rows that stay in captured graphs, packed KV blocks."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cpu.conftest import Engine, Question, ReferenceFor
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.pictures import noise_image
from vllm_crop.eviction.grouping import predict_packed_grouping
from vllm_crop.eviction.report import built_groups
from vllm_crop.eviction.stage_inputs import RunningEvictions

pytestmark = pytest.mark.vllm_runtime


def test_evicted_tokens_that_stay_in_a_captured_step(
    deep_checkpoint: Path, deep_reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's one-token chunk may replay a decode graph, whose rows cannot be dropped: an evicted token
    then runs through the late layers, writes no KV, and disturbs nobody."""
    views = RunningEvictions.views
    kept: list[int] = []

    def as_in_a_graph(self: Any, slots: Any, computed: Any, scheduled: Any, keep_rows: bool = False) -> Any:
        found = views(self, slots, computed, scheduled, keep_rows=bool(scheduled.max() == 1))
        kept.append(sum(int((view.kv_indices < 0).sum()) for view in found))
        return found

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
        pytest.skip("only the V2 runner keeps rows in graphs")
    monkeypatch.setattr(RunningEvictions, "views", as_in_a_graph)
    crop = {"method": "plc+ilp", "eviction_layers": [2], "pruning_rate": 0.96}
    engine = Engine(
        deep_checkpoint, crop, long_prefill_token_threshold=1, enable_prefix_caching=False, max_num_seqs=4
    )
    image = noise_image(160)
    asked = [
        Question((image,), {"regions": [region]}, "{images}Is it?\n")
        for region in (cells(2, 3, 3, 4), cells(5, 5, 6, 6))
    ]
    answers = engine.ask(*asked, steps=3)
    assert sum(kept) > 10
    for question, answer in zip(asked, answers, strict=True):
        reference = deep_reference_for(question, engine.config, steps=3)
        assert answer.token_ids == reference.token_ids
        assert difference(answer, reference) <= TOLERANCE
    off = deep_reference_for(
        Question((image,), {"method": "off"}, "{images}Is it?\n"), engine.config, steps=3
    )
    assert difference(off, deep_reference_for(asked[0], engine.config, steps=3)) > NOTICEABLE


def test_packed_blocks_make_one_group_per_stage(
    staged_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers' own specs under the layout with blocks outermost, grouped by vLLM."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from tests.upstream import get_kv_cache_groups

    engine = staged_engine.llm.llm_engine
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLNHC")
    layers = staged_engine.model.language_model.model.layers
    specs = {
        layer.self_attn.attn.layer_name: layer.self_attn.attn.get_kv_cache_spec(engine.vllm_config)
        for layer in layers
    }
    config = SimpleNamespace(
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLNHC),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    groups = get_kv_cache_groups(config, specs)
    expected = predict_packed_grouping(8, (2, 5), 32)
    assert built_groups(SimpleNamespace(kv_cache_groups=groups)) == [(0, 2), (1, 3), (2, 3)]
    assert {spec.block_size for spec in specs.values()} == set(expected.block_sizes)
    assert len(set(expected.block_sizes)) > 1
