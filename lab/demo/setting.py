# SPDX-License-Identifier: Apache-2.0
"""What the demo serves and asks."""

import json
from pathlib import Path

BUILD = Path("build/demo")
MODEL = Path("lab/checkpoints/tinyvqa")
PRUNING_RATE = 0.889  # 64 of 576 tokens on average over layers, the least of the paper's three
# The first of twelve layers alone spends 48 of these 64 tokens with "ilp"; a second one would leave no room.
EVICTION_LAYERS = (1,)
BLOCK_SIZE = 32  # the smallest on a CPU
# Layer 3 of twelve looks at what is asked for (docs/localization.md). A flat map is served whole.
LOCALIZER = {
    **{"kind": "attention", "layers": [3], "prompt": "{question}", "thumbnail_tokens": 64},
    **{"further_window": 0.35, "whole_below": 0.3, "timeout_s": 60},
}
SERVER_OPTIONS = (
    *("--plugin", "crop", "--crop-config"),
    json.dumps({"pruning_rate": PRUNING_RATE, "eviction_layers": EVICTION_LAYERS, "localizer": LOCALIZER}),
    *("--dtype", "float32", "--max-model-len", "2048", "--block-size", str(BLOCK_SIZE), "--enforce-eager"),
)
SERVER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
SCENES = 4  # of ten questions each
ANSWER_TOKENS = 5
KV_ATTEMPTS = 20  # on a busy machine an answer is finished before the server is asked what it takes
KV_TOKENS = 12  # answers are too short to look at the KV cache while one is given


def plugins_with_page(named: str | None) -> str:
    """What VLLM_PLUGINS must say for the playground to be served, beside the plugins it names already."""
    others = [name for name in (named or "").split(",") if name and name != "crop"]
    return ",".join(["crop", *others])
