# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: the tiny checkpoint and pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA whose logits depend on all of its input."""
    from vllm_crop.dummy_llava import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("llava"))


def noise_image(seed: int, width: int = 336, height: int = 336) -> Image.Image:
    """Random pixels: every token differs from every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
