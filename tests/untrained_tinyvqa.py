# SPDX-License-Identifier: Apache-2.0
"""tinyvqa's checkpoint before any training, narrow and as deep as a test needs it."""

from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from lab.tinyvqa import checkpoint, words


def make_untrained(folder: Path, layers: int) -> Path:
    """Weights larger than transformers' own, so that answers depend on what is seen."""
    torch.manual_seed(0)
    tokenizer = words.make_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(checkpoint.make_config(tokenizer, hidden=64, layers=layers))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    checkpoint.save(folder, model, checkpoint.make_processor(tokenizer))
    return folder
