# SPDX-License-Identifier: Apache-2.0
"""What the demo serves and asks."""

import json
from pathlib import Path

from vllm_crop.geometry import Box, Region

BUILD = Path("build/demo")
PICTURE_SIZE = (672, 672)
# The sign: 6x6 of the model's 24x24 tokens, as much as 2x2 cells of CROP's 8x8 grid.
SIGN = Region((Box(13 / 24, 4 / 24, 19 / 24, 10 / 24),))
PRUNING_RATE = 0.778  # 128 of 576 tokens on average over layers, the middle one of the paper's three
# The first of six layers alone spends 96 of these 128 tokens with "ilp"; a second one would leave no room.
EVICTION_LAYERS = (1,)
BLOCK_SIZE = 32  # the smallest on a CPU
SERVER_OPTIONS = (
    *("--plugin", "crop"),
    *("--crop-config", json.dumps({"pruning_rate": PRUNING_RATE, "eviction_layers": EVICTION_LAYERS})),
    *("--dtype", "float32", "--max-model-len", "2048", "--block-size", str(BLOCK_SIZE), "--enforce-eager"),
)
SERVER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
REPEATS = 7
ANSWER_TOKENS = 12
