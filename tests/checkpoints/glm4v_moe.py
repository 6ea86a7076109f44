# SPDX-License-Identifier: Apache-2.0
"""A GLM-4V checkpoint with a mixture of experts, otherwise as glm4v.py makes it."""

from pathlib import Path
from typing import Any

from tests.checkpoints.glm4v import TINY, config_parts, make_processor
from vllm_crop.benchmarking.dummy_llava import DummySize, scale_weights

EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
}


def make_moe_config(size: DummySize, tokenizer: Any) -> Any:
    """The Glm4vMoeConfig; every decoder layer but the first has experts."""
    from transformers import Glm4vMoeConfig

    parts = config_parts(size, tokenizer)
    parts["text_config"] |= {
        "head_dim": size.hidden // size.heads,
        "moe_intermediate_size": 3 * size.hidden // 2,
        "use_qk_norm": False,
        **EXPERTS,
    }
    return Glm4vMoeConfig(architectures=["Glm4vMoeForConditionalGeneration"], **parts)


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0, processor: str = "Glm4v") -> Path:
    """Write config, processor (of GLM-4.6V if it is "Glm46V") and scaled random weights to `folder`."""
    import torch
    from transformers import Glm4vMoeForConditionalGeneration

    made = make_processor(processor)
    config = make_moe_config(size, made.tokenizer)
    torch.manual_seed(seed)
    model = scale_weights(Glm4vMoeForConditionalGeneration(config), size)
    for name, tensor in model.state_dict().items():
        if name.endswith(("_proj.bias", "e_score_correction_bias")):
            tensor.normal_(0, 0.1)  # zeros otherwise, which could be left out unnoticed
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
