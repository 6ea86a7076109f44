# SPDX-License-Identifier: Apache-2.0
"""The parts of the time to the first token are those of a real engine, each where it belongs."""

import io
from pathlib import Path

import pytest

from vllm_crop.benchmarking.where import MODES, PARTS, WhereOutcome, ask_in_turn, where_table
from vllm_crop.compression.weights import read_resampler, write_untrained
from vllm_crop.families.checkpoint import load_model_config
from vllm_crop.measuring.provenance import Machine

pytestmark = pytest.mark.vllm_runtime


def test_every_part_is_timed_where_it_happens(deep_checkpoint: Path) -> None:
    crop = {"localizer": {"kind": "attention", "whole_below": 0, "layers": [3]}}
    crops = {
        "off": {"method": "off"},
        "region": {"regions": [[[0.2, 0.2, 0.4, 0.4]]]},
        "again": {"regions": [[[0.4, 0.2, 0.6, 0.4]]]},
        "attention": {"question": "What is it?"},
    }
    runs, compressor = ask_in_turn(
        deep_checkpoint, crop, crops, 3, 336, 2048, is_cpu=True, serve_args=["--load-format", "dummy"]
    )
    assert compressor is None
    assert set(runs) == set(MODES)
    for mode, of_mode in runs.items():
        assert len(of_mode) == 3
        for run in of_mode:
            seen = {part for part, took in run.parts.items() if took > 0}
            of_view = {part for part in PARTS if part.startswith("view")}
            assert seen == set(PARTS) - {"compressor"} - (set() if mode == "attention" else of_view)
            assert (run.tower_tokens == 0) == (mode == "again"), "its features are kept"
            assert sum(run.parts.values()) == pytest.approx(run.total)
    for run in runs["attention"]:
        # The view is the picture itself: its features are found again.
        assert run.parts["tower"] < run.parts["view tower"]


def test_a_compressor_is_timed_and_weighed(deep_checkpoint: Path, tmp_path: Path) -> None:
    weights = write_untrained(tmp_path, "tiny", load_model_config(str(deep_checkpoint)))
    crop = {
        **{"compression": "resampler", "resampler": {"weights": str(weights)}},
        "localizer": {"kind": "attention", "whole_below": 0, "layers": [3]},
    }
    crops = {"off": {"method": "off"}, "region": {"regions": [[[0.2, 0.2, 0.4, 0.4]]]}}
    runs, compressor = ask_in_turn(
        deep_checkpoint, crop, crops, 1, 336, 2048, is_cpu=True, serve_args=["--load-format", "dummy"]
    )
    assert compressor is not None
    own, working = compressor
    assert own == pytest.approx(sum(part.nbytes for part in read_resampler(weights).parameters()) / 2**20)
    assert 0 < working < 10
    (off,), (region,) = runs["off"], runs["region"]
    assert off.parts.get("compressor", 0) == 0
    assert 0 < region.parts["compressor"] < region.total


def test_the_table_has_all_of_it() -> None:
    from rich.console import Console

    parts = {mode: dict.fromkeys(PARTS, 1.25) for mode in MODES}
    totals = {"off": 200.0, "region": 50.0, "again": 50.0, "attention": 80.0}
    console = Console(width=120, record=True, file=io.StringIO())
    tower, prompt = (
        {"off": 400, "region": 90, "again": 20, "attention": 100},
        {"off": 440, "region": 80, "again": 80, "attention": 80},
    )
    spans, cpu = (
        dict.fromkeys(MODES, (40.0, 240.0)),
        {"off": 400.0, "region": 60.0, "again": 60.0, "attention": 120.0},
    )
    outcome = WhereOutcome(Machine("a device", True, 2, 0.0), 8, parts, totals, spans, cpu, tower, prompt)
    console.print(where_table(outcome))
    said = console.export_text()
    assert "0.25x" in said
    assert "0.40x" in said
    assert "40 to 240" in said
    assert "0.15x" in said  # of the CPU time
    assert "100 (0.25x)" in said
    assert "80 (0.18x)" in said
    assert all(title in said for title in PARTS.values())
