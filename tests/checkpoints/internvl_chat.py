# SPDX-License-Identifier: Apache-2.0
"""The InternVL of benchmarking/dummy_internvl.py as OpenGVLab publishes it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_crop.benchmarking.dummy_internvl import (
    CHAT_TEMPLATE,
    CONTEXT,
    MAX_TILES,
    PATCH,
    TILE,
    TINY,
    make_checkpoint,
    make_model,
    named_tokenizer,
)
from vllm_crop.benchmarking.dummy_llava import DummySize

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


def make_chat_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write the same model to `folder` as OpenGVLab publishes it; with the folder "hf" for transformers."""
    from safetensors.torch import save_file

    make_checkpoint(folder / "hf", size, seed)
    tokenizer = named_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(CONTEXT, "<image>")
    tokenizer.save_pretrained(folder)
    model = make_model(size, tokenizer, seed)
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
