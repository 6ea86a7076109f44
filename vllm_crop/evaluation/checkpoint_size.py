# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's image processor says about the size of visual tokens."""

import math
from typing import Any

from vllm_crop.evaluation.controls import TokenSize


def token_size(processor: Any) -> TokenSize:
    """From a Qwen2-VL processor."""
    images = processor.image_processor
    pixels = images.patch_size * images.merge_size
    return TokenSize(pixels, math.ceil(images.size["shortest_edge"] / pixels**2))
