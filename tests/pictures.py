# SPDX-License-Identifier: Apache-2.0
"""Pictures for tests."""

import numpy as np
from PIL import Image


def noise_image(seed: int, width: int = 336, height: int = 336) -> Image.Image:
    """Random pixels: every token differs from every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
