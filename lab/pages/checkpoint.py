# SPDX-License-Identifier: Apache-2.0
"""The model's shape: Qwen2.5-VL's architecture, small. Stock transformers and stock vLLM load it."""

from typing import Any

from lab.pages import tokenizer as words
from lab.tinyvqa.checkpoint import MERGE, PATCH, TOKEN
from lab.tinyvqa.words import (
    END,
    IMAGE_PAD,
    MAX_POSITIONS,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

HIDDEN, LAYERS, HEAD_DIM = 192, 16, 32
TOWER_HIDDEN, TOWER_LAYERS = 160, 6
WINDOW = 4 * TOKEN  # pixels
LEAST_SIDE = 96  # pixels of a square picture that is not enlarged
# M-RoPE gives columns the slowest rotations: over a page they must neither stand still nor turn twice.
ROPE_THETA = 30.0
MROPE_SECTION = (4, 6, 6)


def make_config(tokenizer: Any) -> Any:
    """The Qwen2_5_VLConfig."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "depth": TOWER_LAYERS,
        "hidden_size": TOWER_HIDDEN,
        "intermediate_size": 3 * TOWER_HIDDEN,
        "num_heads": TOWER_HIDDEN // HEAD_DIM,
        "out_hidden_size": HIDDEN,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": WINDOW,
        "fullatt_block_indexes": [TOWER_LAYERS - 1],
    }
    text = {
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": HIDDEN // HEAD_DIM,
        "vocab_size": words.VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "mrope_section": list(MROPE_SECTION),
        },
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids["<|pad|>"],
        "tie_word_embeddings": True,
    }
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        dtype="float32",
    )
