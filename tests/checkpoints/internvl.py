# SPDX-License-Identifier: Apache-2.0
"""InternVL checkpoints of any size with random weights, scaled as in benchmarking/dummy_llava.py: in
transformers' format with a Qwen3, and in OpenGVLab's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_crop.benchmarking import dummy_llava
from vllm_crop.benchmarking.dummy_llava import DummySize, make_tokenizer, scale_weights, text_sizes

TINY = DummySize(layers=8, branch_gain=0.6)
PATCH, TILE, MAX_TILES = 14, 112, 12  # 16 tokens a tile
START, END, CONTEXT, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"
SPECIAL_TOKENS = (*dummy_llava.SPECIAL_TOKENS, START, END, CONTEXT, VIDEO)
# Images are written as their format's chat templates write them.
CHAT_TEMPLATE = dummy_llava.CHAT_TEMPLATE.replace(dummy_llava.IMAGE_TOKEN, CONTEXT)
# What a checkpoint in OpenGVLab's format brings along: transformers has no configuration of its kind.
_CONFIGURATION = """
from transformers import PretrainedConfig, Qwen3Config


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen3Config(**(llm_config or {}))
"""


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


def make_config(size: DummySize, tokenizer: Any) -> Any:
    """The InternVLConfig; vision tower and projector as published."""
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen3Config

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = InternVLVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=2 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=[TILE, TILE],
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
        image_seq_length=(TILE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
        dtype="float32",
    )


def _make_model(size: DummySize, tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import InternVLForConditionalGeneration

    torch.manual_seed(seed)
    model = scale_weights(InternVLForConditionalGeneration(make_config(size, tokenizer)), size)
    for layer in model.model.language_model.layers:  # queries are normalised: what their width does elsewhere
        layer.self_attn.q_norm.weight.data.fill_(2.0)
    return model


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`, in transformers' format."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    tokenizer, edges = named_tokenizer(), {"height": TILE, "width": TILE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=edges, max_patches=MAX_TILES),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=edges),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    _make_model(size, tokenizer, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_chat_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write the same model to `folder` as OpenGVLab publishes it; with the folder "hf" for transformers."""
    from safetensors.torch import save_file

    make_checkpoint(folder / "hf", size, seed)
    tokenizer = named_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(CONTEXT, "<image>")
    tokenizer.save_pretrained(folder)
    model = _make_model(size, tokenizer, seed)
    known = model.config.to_dict()
    vision = known["vision_config"] | {
        **{"image_size": TILE, "patch_size": PATCH, "qkv_bias": True, "qk_normalization": False},
        **{"norm_type": "layer_norm", "initializer_factor": 0.1, "model_type": "intern_vit_6b"},
    }
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": known["text_config"],
        **{"downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "template": "internvl2_5"},
        **{"dynamic_image_size": True, "use_thumbnail": True, "force_image_size": TILE},
        **{"min_dynamic_patch": 1, "max_dynamic_patch": MAX_TILES, "dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "configuration_internvl_chat.py").write_text(_CONFIGURATION)
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": TILE, "size": TILE}))
    save_file(dict(_opengvlab_names(model)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _opengvlab_names(model: Any) -> Iterator[tuple[str, Any]]:
    import torch

    state = dict(model.state_dict())
    for name in list(state):
        if ".attention.q_proj." in name:
            parts = [state.pop(name.replace("q_proj", one)) for one in ("q_proj", "k_proj", "v_proj")]
            state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    renamed = {
        **{"model.vision_tower.": "vision_model.", "model.language_model.": "language_model.model."},
        **{"model.multi_modal_projector.layer_norm": "mlp1.0", "lm_head.": "language_model.lm_head."},
        "model.multi_modal_projector.linear_1": "mlp1.1",
        "model.multi_modal_projector.linear_2": "mlp1.3",
        **{"embeddings.cls_token": "embeddings.class_embedding", "encoder.layer.": "encoder.layers."},
        **{"position_embeddings": "position_embedding", "patch_embeddings.projection": "patch_embedding"},
        **{"attention.projection_layer": "attn.proj", "lambda_1": "ls1", "lambda_2": "ls2"},
        **{"layernorm_before": "norm1", "layernorm_after": "norm2"},
    }
    for name, tensor in state.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        yield name, tensor.contiguous()
