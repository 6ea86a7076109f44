# SPDX-License-Identifier: Apache-2.0
"""The parts of `make demo` that need no server."""

import math
from pathlib import Path

import pytest
from rich.console import Console

from vllm_crop.budget import retained_per_stage
from vllm_crop.demo.client import Answer
from vllm_crop.demo.report import table
from vllm_crop.demo.rows import crop_fields, kv_mib, row
from vllm_crop.demo.setting import EVICTION_LAYERS, PRUNING_RATE, SIGN
from vllm_crop.dummy_llava import DEMO
from vllm_crop.geometry import TokenGrid

ANSWER = Answer("words", 617, {"tokens_after_plc": 576, "tokens_avg": 127.67}, math.nan, kv_blocks=35)


def test_rows_are_off_and_every_method_at_one_rate() -> None:
    off, *pruned = crop_fields()
    assert off == {"method": "off"}
    assert [field["method"] for field in pruned] == ["plc", "ilp", "plc+ilp"]
    assert {field["pruning_rate"] for field in pruned} == {PRUNING_RATE}


def test_every_method_meets_the_budget_and_keeps_the_sign() -> None:
    sign = len(TokenGrid(24, 24).tokens_in(SIGN))
    for method in ("plc", "ilp", "plc+ilp"):
        counts = retained_per_stage(576, PRUNING_RATE, method, DEMO.layers, EVICTION_LAYERS)  # type: ignore[arg-type]
        assert counts[-1] >= sign


def test_row_has_what_scripts_rely_on() -> None:
    field = crop_fields()[2]
    line = row(field, ANSWER, [98.0, 94.0, 99.0])
    assert list(line) == [
        *("method", "regions", "pruning_rate", "image_tokens", "tokens_avg", "prompt_tokens"),
        *("kv_blocks", "kv_mib", "ttft_ms_median", "ttft_ms_range", "answer"),
    ]
    assert line["regions"] == [SIGN.as_lists()]
    assert (line["image_tokens"], line["tokens_avg"], line["kv_blocks"]) == (576, 127.67, 35)
    assert (line["ttft_ms_median"], line["ttft_ms_range"]) == (98.0, [94.0, 99.0])
    assert line["kv_mib"] == pytest.approx(kv_mib(35), abs=0.01)


def test_kv_memory_of_a_whole_request() -> None:
    # 20 blocks of 32 tokens in each of 6 layers, 512 keys and 512 values of 4 bytes each.
    assert kv_mib(20 * 6) == 20 * 32 * 6 * 2 * 512 * 4 / 2**20


def test_table_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    lines = [row(field, ANSWER, [1098.0, 1094.0, 1099.0]) for field in crop_fields()]
    console.print(table(lines))
    text = console.export_text()
    assert "1098 (1094-1099) 1.00x" in text
    assert "…" not in text
