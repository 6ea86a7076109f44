# SPDX-License-Identifier: Apache-2.0
"""The README.md of a trained compressor."""

from typing import Any

from vllm_crop.compression.settings import ResamplerCard


def describe(card: ResamplerCard) -> str:
    """As the Hub shows it."""
    shape, training = card.shape, card.training
    data = training.get("data") or f"{training.get('pictures')} generated scenes"
    return f"""---
library_name: vllm-crop
base_model: {card.base_model}
tags: [vision-language, token-pruning, vllm]
---

# A compressor for {card.base_model}

Weights for vllm-crop's compression "resampler": learned queries read the region of a question and what is
around it, and the language model gets their summary in place of the visual tokens (after CROP, arXiv
2505.21233). The model itself is not changed.

    vllm serve {card.base_model} --plugin crop \\
        --crop-config '{{"compression": "resampler", "resampler": {{"weights": "THIS FOLDER"}}}}'

| | |
|---|---|
| features | {shape.feature_size} columns |
| width, heads, MLP | {shape.width}, {shape.num_heads}, {shape.mlp_size} |
| recipe | {training.get("recipe")}, {training.get("done")} steps of {training.get("batch")} questions |
| data | {data} |
| pruning rates | {", ".join(f"{rate:g}" for rate in training.get("rates", ()))} |
| seed | {training.get("seed")} |
{_beginning(training)}"""


def _beginning(training: dict[str, Any]) -> str:
    """What it began with, if that was another compressor."""
    first = training.get("started_from")
    if not first:
        return ""
    steps, pictures, seed = (first.get(name) for name in ("done", "pictures", "seed"))
    return f"| began with | another's weights after {steps} steps on {pictures} scenes, seed {seed} |\n"
