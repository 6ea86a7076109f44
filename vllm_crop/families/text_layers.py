# SPDX-License-Identifier: Apache-2.0
"""How many layers the language model has, which look at all that came before, and what the others keep."""

from collections.abc import Mapping
from typing import Any

from vllm_crop.errors import UnsupportedModelError

# transformers' defaults for what a config.json may leave out.
_DEFAULT_LAYERS = {
    **{"llama": 32, "mistral": 32, "qwen2": 32, "qwen3": 32},
    **{"qwen2_vl": 80, "qwen2_vl_text": 80},
    **{"qwen2_5_vl": 80, "qwen2_5_vl_text": 80, "qwen3_vl": 32, "qwen3_vl_text": 32},
    **{"qwen3_vl_moe": 24, "qwen3_vl_moe_text": 24},
    **{"qwen3_5": 32, "qwen3_5_text": 32, "qwen3_5_moe": 40, "qwen3_5_moe_text": 40},
    **{"gemma4": 30, "gemma4_text": 30},
    **{"glm4v": 40, "glm4v_text": 40, "glm4v_moe": 46, "glm4v_moe_text": 46},
}


def decoder_layers(text_config: Mapping[str, Any]) -> int:
    """`num_hidden_layers`, or the default transformers gives this text model."""
    model_type = text_config.get("model_type", "llama")
    layers = text_config.get("num_hidden_layers", _DEFAULT_LAYERS.get(model_type))
    if layers is None:
        raise UnsupportedModelError(f"config.json names no num_hidden_layers for {model_type!r}")
    return int(layers)


# Hybrids whose config.json may leave `layer_types` out: every so many layers look, as transformers has it.
_FULL_ATTENTION_EVERY = dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), 4)


def full_attention_layers(model: Mapping[str, Any], num_layers: int) -> list[int]:
    """The layers that look at every earlier token; all, where a config.json says nothing."""
    text = model.get("text_config") or model
    every = text.get("full_attention_interval") or _FULL_ATTENTION_EVERY.get(text.get("model_type", ""), 1)
    kinds = text.get("layer_types") or [
        "linear_attention" if (layer + 1) % every else "full_attention" for layer in range(num_layers)
    ]
    return [layer for layer, kind in enumerate(kinds[:num_layers]) if kind == "full_attention"]


# transformers' defaults of Qwen3.5 for what a config.json may leave out.
_STATE = {
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256},
}


def state_tokens(model: Mapping[str, Any]) -> int:
    """Of a hybrid with Gated DeltaNets: the tokens whose keys and values take as much as a state, in 16 bits.

    vLLM gives blocks of keys and values about so many tokens (platforms/interface.py), as all take the same.
    """
    given = model.get("text_config") or model
    heads = 2 if "moe" in given.get("model_type", "") else 4
    text: dict[str, Any] = {**_STATE, "num_key_value_heads": heads, **given}
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    convolution = 2 * channels * (text["linear_conv_kernel_dim"] - 1)
    state = values * text["linear_key_head_dim"] * (4 if text.get("mamba_ssm_dtype") == "float32" else 2)
    of_a_token: int = 4 * text["num_key_value_heads"] * text["head_dim"]
    return -(-int(convolution + state) // of_a_token)
