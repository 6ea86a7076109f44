# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-VL checkpoint with a mixture of experts, otherwise as qwen3_vl.py makes it."""

from pathlib import Path
from typing import Any

from tests.checkpoints.qwen3_vl import TINY, make_config, make_processor, sharpen_attention
from vllm_crop.benchmarking.dummy_llava import DummySize, scale_weights

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}


def make_moe_config(size: DummySize, tokenizer: Any) -> Any:
    """The Qwen3VLMoeConfig; every decoder layer has experts."""
    from transformers import Qwen3VLMoeConfig

    config = make_config(size, tokenizer).to_dict()
    config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config["vision_config"] |= {"model_type": "qwen3_vl_moe_vision"}
    config["text_config"] |= {
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 3 * size.hidden // 2,
        **EXPERTS,
    }
    return Qwen3VLMoeConfig.from_dict(config)


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0) -> Path:
    """Write config, processor and scaled random weights to `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLMoeForConditionalGeneration

    processor = make_processor()
    config = make_moe_config(size, processor.tokenizer)
    torch.manual_seed(seed)
    model = sharpen_attention(scale_weights(Qwen3VLMoeForConditionalGeneration(config), size))
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Published experts are the other way round; transformers and vLLM both turn them.
    tensors = {
        name: (tensor.transpose(1, 2) if ".experts." in name else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
