# SPDX-License-Identifier: Apache-2.0
"""A tiny Gemma 4 with random weights: sliding and full layers, a pool of 3 x 3 patches for a token."""

from pathlib import Path
from typing import Any

import torch

from vllm_crop.benchmarking.dummy_llava import (
    CHAT_TEMPLATE,
    VOCAB_SIZE,
    DummySize,
    make_tokenizer,
    scale_weights,
    text_sizes,
)

TINY = DummySize(layers=6, branch_gain=0.6)
IMAGE = "<|image|>"
FRAME = ("<boi>", "<eoi>")
SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", IMAGE, *FRAME, "<|video|>", "<|audio|>", "<boa>", "<eoa>")


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    from transformers import Gemma4ForConditionalGeneration

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    model = scale_weights(Gemma4ForConditionalGeneration(_config(size, tokenizer)), size)
    with torch.no_grad():
        # The model multiplies embeddings by this, and makes logits of them.
        model.get_input_embeddings().weight /= size.hidden**0.5
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):  # nothing else divides queries times keys
                parameter.mul_(0.2)
    model.save_pretrained(folder)
    _processor(tokenizer).save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    names = ("image_token", "boi_token", "eoi_token", "video_token", "audio_token", "boa_token", "eoa_token")
    plain = make_tokenizer(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=TINY.max_positions,
        extra_special_tokens=dict(zip(names, SPECIAL_TOKENS[3:], strict=True)),
    )


def _config(size: DummySize, tokenizer: Any) -> Any:
    from transformers import Gemma4Config

    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text = {
        **text_sizes(size, 1),
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "head_dim": 32,
        "global_head_dim": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * (size.layers // 3),
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        # vLLM's CPU kernels know causal masks only.
        "use_bidirectional_attention": None,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "position_embedding_size": 512,
        "default_output_length": 280,
    }
    return Gemma4Config(
        architectures=["Gemma4ForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=ids[IMAGE],
        boi_token_id=ids["<boi>"],
        eoi_token_id=ids["<eoi>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        boa_token_id=ids["<boa>"],
        eoa_token_id=ids["<eoa>"],
        eoa_token_index=ids["<eoa>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        dtype="float32",
    )


def _processor(tokenizer: Any) -> Any:
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(),
        chat_template=CHAT_TEMPLATE.replace("<image>", IMAGE),
    )
