# SPDX-License-Identifier: Apache-2.0
"""A LLaVA-OneVision checkpoint of any size with random weights, scaled as in benchmarking/dummy_llava.py."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    DummySize,
    make_tokenizer,
    text_sizes,
)

VIDEO_TOKEN = "<video>"
SPECIAL_TOKENS = (*dummy_llava.SPECIAL_TOKENS, VIDEO_TOKEN)
TINY = DummySize(layers=8, branch_gain=0.6)
# Pixels. Six of a tile fit no patch, as in published checkpoints. Tiles are as large as theirs:
# vLLM profiles with the image that has most tokens with those.
PATCH, TILE = 42, 384


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The LlavaOnevisionConfig, with the resolutions of published checkpoints."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = SiglipVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=2 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        **text_sizes(size, size.heads // 2),
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE_TOKEN],
        video_token_index=ids[VIDEO_TOKEN],
        dtype="float32",
        eos_token_id=ids["</s>"],
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from transformers import (
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = make_tokenizer(SPECIAL_TOKENS)
    config = make_config(size, tokenizer)
    edges = {"height": TILE, "width": TILE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=edges),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=edges),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        video_token=VIDEO_TOKEN,
    )
    torch.manual_seed(seed)
    model = dummy_llava.scale_weights(LlavaOnevisionForConditionalGeneration(config), size)
    model.model.image_newline.data.normal_()  # as large as the embeddings it stands between
    for name, parameter in model.named_parameters():
        if name.endswith("patch_embedding.weight"):  # no norm follows, as it does in CLIP
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    dummy_llava.save_weights(folder, model)
    return folder
