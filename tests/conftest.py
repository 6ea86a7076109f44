# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA whose logits depend on all of its input."""
    from vllm_crop.dummy_llava import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def deep_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with eight decoder layers, of which the last matter as much as the first."""
    from vllm_crop.dummy_llava import DEEP, make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("deep-llava"), DEEP)
