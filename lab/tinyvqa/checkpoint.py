# SPDX-License-Identifier: Apache-2.0
"""The model's shape: Qwen2.5-VL's architecture, small. Stock transformers and stock vLLM load it."""

from pathlib import Path
from typing import Any

from lab.tinyvqa import words
from lab.tinyvqa.drawing import CELL, THUMBNAIL

PATCH = 8
MERGE = 2
TOKEN = PATCH * MERGE  # pixels of a visual token's side
LARGEST_SIDE = 768  # pixels of an image that is not scaled down
HIDDEN = 128
LAYERS = 12
HEAD_DIM = 32
# M-RoPE gives columns the slowest rotations. With the usual base they would turn by less than a degree per
# token, and the model could not tell left from right; with a much smaller one nothing would stay in place,
# and it could hardly compare what tokens show.
ROPE_THETA = 100.0
MROPE_SECTION = (4, 4, 8)


def make_config(tokenizer: Any, hidden: int = HIDDEN, layers: int = LAYERS, vision_layers: int = 4) -> Any:
    """The Qwen2_5_VLConfig.

    The vision tower looks within windows of one cell, and at the whole image in its last layer. The language
    model has as many layers as an eviction at layer 1 needs to leave a ninth of the tokens on average.
    """
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in words.SPECIAL_TOKENS}
    vision = {
        "depth": vision_layers,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": CELL,
        "fullatt_block_indexes": [vision_layers - 1],
    }
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "vocab_size": words.VOCAB_SIZE,
        "max_position_embeddings": words.MAX_POSITIONS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "mrope_section": list(MROPE_SECTION),
        },
        "bos_token_id": None,
        "eos_token_id": ids[words.END],
        "pad_token_id": ids["<|pad|>"],
        "tie_word_embeddings": True,
    }
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=ids[words.IMAGE_PAD],
        video_token_id=ids[words.VIDEO_PAD],
        vision_start_token_id=ids[words.VISION_START],
        vision_end_token_id=ids[words.VISION_END],
        tie_word_embeddings=True,
        dtype="float32",
    )


def make_processor(tokenizer: Any, least_side: int = 8 * THUMBNAIL // 2) -> Any:
    """Images keep their size, rounded to whole visual tokens.

    Args:
        least_side: pixels of a square picture that is not enlarged.
    """
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    mean = [0.5, 0.5, 0.5]
    options = {"patch_size": PATCH, "merge_size": MERGE, "image_mean": mean, "image_std": mean}
    size = {"shortest_edge": least_side**2, "longest_edge": LARGEST_SIDE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **options),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, **options),
        chat_template=words.CHAT_TEMPLATE,
    )


def save(folder: Path, model: Any, processor: Any) -> None:
    """Write what `from_pretrained` and `vllm serve` read; weights in half precision, to run in any."""
    import torch

    weights = {
        name: tensor.to(torch.float16)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
