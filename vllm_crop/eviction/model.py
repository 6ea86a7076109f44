# SPDX-License-Identifier: Apache-2.0
"""Turns a loaded vision-language model into one whose language model evicts."""

from typing import Any

from vllm.config import VllmConfig

from vllm_crop.eviction.decoder import EvictingDecoder
from vllm_crop.eviction.settings import EvictionSettings


def start_eviction(model: Any, vllm_config: VllmConfig) -> EvictingDecoder | None:
    """Mark the late layers of a model and give it our ModelState; None if the server evicts nothing.

    Args:
        model: has `language_model.model`, the decoder (vllm/model_executor/models/llava.py).
    """
    settings = EvictionSettings.from_hf_config(vllm_config.model_config.hf_config)
    if not settings.stages:
        return None
    # vLLM asks a model for its ModelState if it has this method, and decides itself if not.
    model.get_model_state_cls = _model_state_cls
    decoder = EvictingDecoder(model.language_model.model, settings)
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_piecewise_cudagraphs():
        decoder.prepare_for_graphs(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.get_hidden_size(),
            vllm_config.model_config.dtype,
        )
    return decoder


def _model_state_cls() -> type[Any]:
    from vllm_crop.eviction.model_state import EvictionModelState  # needs Triton, which V1 does without

    return EvictionModelState
