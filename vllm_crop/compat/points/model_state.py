# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's part of eviction and of heat maps."""

from vllm_crop.compat.points.point import UpstreamPoint

_MODEL_STATE = "vllm.v1.worker.gpu.model_states"


def _model_state(method: str, parameters: str, reason: str) -> UpstreamPoint:
    name = f"DefaultModelState.{method}"
    return UpstreamPoint(f"{_MODEL_STATE}.default", name, tuple(parameters.split()), reason)


def _of_hybrids(method: str, parameters: str) -> UpstreamPoint:
    name = f"MambaHybridModelState.{method}"
    return UpstreamPoint(
        f"{_MODEL_STATE}.mamba_hybrid", name, tuple(parameters.split()), "the same, of models with states"
    )


MODEL_STATE_POINTS = (
    UpstreamPoint(
        _MODEL_STATE,
        "resolve_model_state_cls",
        ("vllm_config", "model"),
        "asks the model for our ModelState (get_model_state_cls)",
    ),
    _model_state(
        "add_request",
        "self req_index new_req_data",
        "reads in the worker what a request evicts and whether it asks for a heat map",
    ),
    _model_state("remove_request", "self req_id", "forgets it"),
    _model_state("initialize_kv_cache", "self kv_cache_config block_tables", "finds the KV cache groups"),
    _model_state(
        "prepare_attn",
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config for_capture",
        "leaves later layers out of the stock attention metadata",
    ),
    _model_state(
        "prepare_inputs", "self input_batch req_states", "hands the rows to drop and to watch to the model"
    ),
    _of_hybrids("add_request", "self req_index new_req_data"),
    _of_hybrids("initialize_kv_cache", "self kv_cache_config block_tables"),
    _of_hybrids(
        "prepare_attn",
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config for_capture",
    ),
)
