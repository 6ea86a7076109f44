# SPDX-License-Identifier: Apache-2.0
"""An InternVL of any size with random weights, scaled as in dummy_llava.py, for benchmark and tests."""

from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import DummySize, make_tokenizer, scale_weights, text_sizes

TINY = DummySize(layers=8, branch_gain=0.6)
# The tower's share of the multiply-adds is that of InternVL3.5-8B, 0.13; so are its tiles, of 256 tokens.
BENCH = DummySize(layers=12, hidden=768, heads=12, vision_layers=8, vision_hidden=256, branch_gain=0.6)
PATCH, MAX_TILES = 14, 12
TILE, BENCH_TILE = 112, 448  # pixels; 16 tokens and 256
START, END, CONTEXT, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"
SPECIAL_TOKENS = (*dummy_llava.SPECIAL_TOKENS, START, END, CONTEXT, VIDEO)
# Images are written as their format's chat templates write them.
CHAT_TEMPLATE = dummy_llava.CHAT_TEMPLATE.replace(dummy_llava.IMAGE_TOKEN, CONTEXT)


def named_tokenizer() -> Any:
    """The tokenizer, which knows what frames an image and stands for its tokens."""
    from transformers import PreTrainedTokenizerFast

    plain = make_tokenizer(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 4096},
        extra_special_tokens={
            **{"start_image_token": START, "end_image_token": END},
            **{"context_image_token": CONTEXT, "video_token": VIDEO},
        },
    )


def make_config(size: DummySize, tokenizer: Any, tile: int = TILE) -> Any:
    """The InternVLConfig; vision tower and projector as published."""
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen3Config

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = InternVLVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=2 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=[tile, tile],
        patch_size=[PATCH, PATCH],
        attention_bias=True,
    )
    text = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        **text_sizes(size, size.heads // 2),
        head_dim=size.hidden // size.heads,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=ids[CONTEXT],
        image_seq_length=(tile // PATCH // 2) ** 2,
        tie_word_embeddings=False,
        dtype="float32",
    )


def make_model(size: DummySize, tokenizer: Any, seed: int = 0) -> Any:
    """A tiny model of transformers with scaled weights."""
    return _with_weights(make_config(size, tokenizer), size, seed)


def _with_weights(config: Any, size: DummySize, seed: int) -> Any:
    import torch
    from transformers import InternVLForConditionalGeneration

    torch.manual_seed(seed)
    model = scale_weights(InternVLForConditionalGeneration(config), size)
    for layer in model.model.language_model.layers:  # queries are normalised: what their width does elsewhere
        layer.self_attn.q_norm.weight.data.fill_(2.0)
    return model


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`, in transformers' format."""
    return _write_checkpoint(folder, size, seed, TILE, weights=True)


def make_bench_checkpoint(folder: Path, weights: bool = True) -> Path:
    """The benchmark's model; without `weights` only what vLLM needs to make its own up."""
    return _write_checkpoint(folder, BENCH, 0, BENCH_TILE, weights)


def _write_checkpoint(folder: Path, size: DummySize, seed: int, tile: int, weights: bool) -> Path:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    tokenizer, edges = named_tokenizer(), {"height": tile, "width": tile}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=edges, max_patches=MAX_TILES),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=edges),
        image_seq_length=(tile // PATCH // 2) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    config = make_config(size, tokenizer, tile)
    if weights:
        _with_weights(config, size, seed).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
