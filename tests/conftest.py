# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.selection import left_out

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test-all`."""
    parser.addoption(
        "--all-families", action="store_true", help="run every scenario alone for every family, not for some"
    )


# Without a deadline: other processes take turns on the same cores.
settings.register_profile("some", max_examples=60, deadline=None)
settings.register_profile("many", max_examples=400, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """How many examples a property is tried on."""
    settings.load_profile("many" if config.getoption("--all-families") else "some")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what tests/selection.py says."""
    if config.getoption("--all-families"):
        return
    out = set(left_out(items, interpreted="TRITON_INTERPRET" in os.environ))
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


STARTS: Counter[str] = Counter()  # of what makes a test run slow


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many engines and servers were started."""
    if STARTS:
        started = ", ".join(f"{count} {name}" for name, count in sorted(STARTS.items()))
        terminalreporter.write_line(f"started: {started}")


CheckpointOf = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> CheckpointOf:
    """A tiny random checkpoint of a family (see tests/families.py) and size; each is made once."""

    @cache
    def make(family, size):  # type: ignore[no-untyped-def]
        return family.make_checkpoint(tmp_path_factory.mktemp(str(family)), size)

    return make


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: CheckpointOf) -> Path:
    """A tiny random LLaVA whose logits depend on all of its input."""
    from tests.families import LLAVA

    return checkpoint_of(LLAVA, LLAVA.shallow)


@pytest.fixture(scope="session")
def deep_checkpoint(checkpoint_of: CheckpointOf) -> Path:
    """The same with eight decoder layers, of which the last matter as much as the first."""
    from tests.families import LLAVA

    return checkpoint_of(LLAVA, LLAVA.deep)
