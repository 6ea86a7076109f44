# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop bench --api-instructions`: its table, and what it says where valgrind is missing."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from vllm_crop.benchmarking.api_instructions import (
    ApiInstructions,
    CountingError,
    api_instructions_table,
    measure_api_instructions,
)


def test_what_is_added_is_the_median_beside_the_median() -> None:
    counted = ApiInstructions(
        (336, 336), (30_000_000, 40_000_000, 50_000_000, 90_000_000), {"plc": (41_000_000, 46_350_000)}
    )
    out = io.StringIO()
    Console(file=out, width=100).print(api_instructions_table(counted))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["336x336", "stock", "45.0", "40.0", "to", "50.0"] in rows
    assert ["plc", "43.7", "41.0", "to", "46.4", "-2.9%"] in rows


def test_without_valgrind_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CountingError, match="apt-get install valgrind"):
        next(measure_api_instructions())
