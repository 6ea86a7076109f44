# SPDX-License-Identifier: Apache-2.0
"""A Mistral 3 checkpoint of any size with random weights, scaled as in benchmarking/dummy_llava.py."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import DummySize, make_tokenizer, scale_weights, text_sizes

TINY = DummySize(layers=8, branch_gain=0.6)
PATCH, MERGE, LONGEST = 14, 2, 504  # 18 tokens along the longest side
IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
SPECIAL_TOKENS = (*dummy_llava.SPECIAL_TOKENS, IMAGE, BREAK, END)
CHAT_TEMPLATE = dummy_llava.CHAT_TEMPLATE.replace(dummy_llava.IMAGE_TOKEN, IMAGE)


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The Mistral3Config."""
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = PixtralVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=2 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=LONGEST,
        patch_size=PATCH,
    )
    text = MistralConfig(
        architectures=["MistralForCausalLM"],
        **text_sizes(size, size.heads // 2),
        sliding_window=None,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
    return Mistral3Config(
        architectures=["Mistral3ForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        spatial_merge_size=MERGE,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
        dtype="float32",
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from transformers import Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    tokenizer = make_tokenizer(SPECIAL_TOKENS)
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": LONGEST}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    model = scale_weights(Mistral3ForConditionalGeneration(make_config(size, tokenizer)), size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
