# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


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
