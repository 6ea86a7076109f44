# SPDX-License-Identifier: Apache-2.0
"""A GLM-4V checkpoint of any size with random weights, scaled as in benchmarking/dummy_llava.py."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import DummySize, make_tokenizer, scale_weights, text_sizes

IMAGE, VIDEO, *BORDERS = (
    f"<|{name}|>"
    for name in (
        *("image", "video", "begin_of_image", "end_of_image"),
        *("begin_of_video", "end_of_video"),
    )
)
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", IMAGE, VIDEO, *BORDERS)
TINY = DummySize(layers=8, branch_gain=0.6, logit_gain=0.7)
PATCH, MERGE, FRAMES = 14, 2, 2
MAX_TOKENS = 640  # of an image
CHAT_TEMPLATE = dummy_llava.CHAT_TEMPLATE.replace(dummy_llava.IMAGE_TOKEN, BORDERS[0] + IMAGE + BORDERS[1])
# Norms behind attention and MLP undo what width the weights before them have: theirs counts in its place.
BRANCH_WIDTH = 0.35
BRANCH_NORMS = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")


def config_parts(size: DummySize, tokenizer: Any) -> dict[str, Any]:
    """What a Glm4vConfig is made of; half of each head is rotated, as in published models."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    image_start, image_end, video_start, video_end = (ids[token] for token in BORDERS)
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 3 * size.hidden,
        "num_heads": 4,
        "out_hidden_size": size.hidden,
        "image_size": 12 * PATCH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
    }
    quarter = size.hidden // size.heads // 4  # frequencies of a head, shared out to time, rows and columns
    text = {
        **text_sizes(size, size.heads // 2),
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [quarter // 4, quarter * 3 // 8, quarter * 3 // 8],
        },
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        "image_start_token_id": image_start,
        "image_end_token_id": image_end,
        "video_start_token_id": video_start,
        "video_end_token_id": video_end,
        "dtype": "float32",
    }


def pixels(tokens: int) -> int:
    """How a bound on the area is written: an image counts as FRAMES of a video."""
    return tokens * FRAMES * (PATCH * MERGE) ** 2


def make_processor(kind: str = "Glm4v") -> Any:
    """The processor, tokenizer included: "Glm4v" is that of GLM-4.1V and 4.5V, "Glm46V" that of 4.6V."""
    import transformers

    edges = {"shortest_edge": pixels(4), "longest_edge": pixels(MAX_TOKENS)}
    whole, images, videos = (
        getattr(transformers, f"{kind}{of}") for of in ("Processor", "ImageProcessor", "VideoProcessor")
    )
    return whole(
        image_processor=images(size=edges),
        tokenizer=make_tokenizer(SPECIAL_TOKENS),
        video_processor=videos(size=edges),
        chat_template=CHAT_TEMPLATE,
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    processor = make_processor()
    config = Glm4vConfig(
        architectures=["Glm4vForConditionalGeneration"], **config_parts(size, processor.tokenizer)
    )
    torch.manual_seed(seed)
    model = scale_weights(Glm4vForConditionalGeneration(config), size)
    for name, weight in model.named_parameters():
        if name.endswith(BRANCH_NORMS):
            weight.data.fill_(BRANCH_WIDTH)
        elif name.endswith("_proj.bias"):  # zeros otherwise, which could be left out unnoticed
            weight.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
