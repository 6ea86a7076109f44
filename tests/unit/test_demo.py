# SPDX-License-Identifier: Apache-2.0
"""The parts of `make demo` that need no server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lab.demo import __main__ as demo
from lab.demo.report import answers_table, costs_table, shares_table
from lab.demo.rows import METHODS, WRONG, Asked, Measured, kv_mib, rows, shares, wrong_region
from lab.demo.setting import EVICTION_LAYERS, PRUNING_RATE
from lab.evaluation.questions import make_test_set
from lab.evaluation.regions import cells_of
from lab.tinyvqa.checkpoint import LAYERS
from lab.tinyvqa.questions import FAMILIES, LOCAL
from vllm_crop.client import CropAnswer
from vllm_crop.measuring.server import Server
from vllm_crop.planning.budget import retained_per_stage

ROOT = Path(__file__).parents[2]


def answer(text: str, tokens: int, ttft_ms: float) -> CropAnswer:
    facts: dict[str, Any] = {"tokens_after_plc": tokens, "tokens_avg": 63.67, "localizer_ms": 1020.4}
    return CropAnswer(text, facts, tokens + 12, ttft_ms)


@pytest.fixture(scope="module")
def measured() -> Measured:
    asked = []
    for scene in make_test_set(2):
        for question in scene.questions:
            columns = (*METHODS, WRONG) if question.boxes else METHODS
            said = {column: "no" if column == WRONG else question.answer for column in columns}
            asked.append(
                Asked(
                    scene,
                    question,
                    {column: answer(said[column], 576, 1098.0 + len(asked)) for column in columns},
                )
            )
    return Measured(tuple(asked), dict.fromkeys(METHODS, 35))


def test_every_method_meets_the_budget() -> None:
    for method in ("plc", "ilp", "plc+ilp"):
        counts = retained_per_stage(576, PRUNING_RATE, method, LAYERS, EVICTION_LAYERS)  # type: ignore[arg-type]
        assert counts[-1] >= 9, "not one cell's tokens"


def test_a_wrong_region_shows_nothing_that_is_needed() -> None:
    for scene in make_test_set(20):
        for question in scene.questions:
            if question.boxes:
                wrong = cells_of(wrong_region(question), 8)
                assert not wrong & cells_of(question.region(8), 8)


def test_rows_have_what_scripts_rely_on(measured: Measured) -> None:
    lines = rows(measured)
    assert [line["method"] for line in lines] == list(METHODS)
    assert list(lines[0]) == [
        *("method", "image_tokens", "tokens_avg", "prompt_tokens", "kv_blocks", "kv_mib"),
        *("ttft_ms_median", "ttft_ms_range", "localizer_ms_median"),
    ]
    assert (lines[1]["image_tokens"], lines[1]["tokens_avg"], lines[1]["kv_blocks"]) == (576, 63.7, 35)
    assert lines[1]["ttft_ms_range"] == [1098.0, 1103.0]
    assert lines[1]["kv_mib"] == pytest.approx(kv_mib(35), abs=0.01)


def test_wrong_answers_are_counted_as_such(measured: Measured) -> None:
    table = shares(measured)
    assert table["ilp"] == {family: [2, 2] for family in FAMILIES}
    assert table[WRONG] == {family: [0, 2] for family in LOCAL}


def test_kv_memory_of_a_whole_request() -> None:
    # 20 blocks of 32 tokens in each of 12 layers, 128 keys and 128 values of 4 bytes each.
    assert kv_mib(20 * 12) == 20 * 32 * 12 * 2 * 128 * 4 / 2**20


def test_tables_fit_a_terminal_of_80_columns(measured: Measured, tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    for table in (answers_table(measured.asked), shares_table(measured), costs_table(rows(measured))):
        console.print(table)
    text = console.export_text()
    assert "1.00x" in text
    assert "no ✗" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("named", "plugins"),
    [
        (None, "crop"),
        ("", "crop"),
        ("crop", "crop"),
        ("lora_resolver", "crop,lora_resolver"),
        ("lora_resolver,crop,other", "crop,lora_resolver,other"),
    ],
)
def test_a_server_that_is_left_running_has_the_playground(
    named: str | None,
    plugins: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: dict[str, str] = {}

    @contextmanager
    def serve(model: str, *options: str, log_path: Path, env: dict[str, str]) -> Iterator[Server]:
        started.update(env)
        yield Server(model, "http://127.0.0.1:8123", 1, (), log_path, 1.0)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(demo, "BUILD", tmp_path)
    monkeypatch.setattr(demo, "console", Console())
    monkeypatch.setattr(demo.time, "sleep", interrupt)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    demo.main(leave_running=True)
    assert started["VLLM_PLUGINS"] == plugins
    assert "http://127.0.0.1:8123/plugins/crop/" in capsys.readouterr().out
