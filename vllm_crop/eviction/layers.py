# SPDX-License-Identifier: Apache-2.0
"""Where a decoder layer keeps what it has seen, and which stage that belongs to.

A layer has either one attention, which keeps keys and values of every token, or one layer with a state
(vllm/model_executor/layers/mamba), which keeps as much whatever it has seen.
"""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.eviction.kv_cache import StageAttentionSpec
from vllm_crop.eviction.report import expected_grouping
from vllm_crop.eviction.state_cache import StageStateSpec


class StagedAttention(Attention):
    """Attention of a layer that runs without what its stage has evicted."""

    crop_stage: int
    crop_num_layers: int
    crop_stages: tuple[int, ...]

    def get_kv_cache_spec(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> KVCacheSpec | None:
        """A spec of its own from stage 1 on, so that vLLM allocates KV for kept tokens only."""
        spec = super().get_kv_cache_spec(vllm_config, *args, **kwargs)
        if self.crop_stage:
            spec = StageAttentionSpec.from_full(spec, self.crop_stage, self.layer_name)
        if spec is None:
            return None
        grouping = expected_grouping(self.crop_num_layers, self.crop_stages, spec.block_size)
        return spec.copy_with_new_block_size(grouping.block_sizes[self.crop_stage])


def set_stage(layer: nn.Module, stage: int, num_layers: int, stages: tuple[int, ...]) -> None:
    """Have vLLM give a decoder layer the cache of its stage.

    Args:
        num_layers: of the decoder.
        stages: its eviction layers.

    Raises:
        UnsupportedModelError: it keeps what it has seen in a way we do not follow.
    """
    if state := state_of(layer):
        _set_stage_of_state(state, stage)
        return
    attention = attention_of(layer)
    attention.__class__ = StagedAttention
    attention.crop_stage = stage
    attention.crop_num_layers, attention.crop_stages = num_layers, stages


def _set_stage_of_state(state: Any, stage: int) -> None:
    if not stage:
        return
    # The class stays: platforms have some of their own (vllm/model_executor/custom_op.py).
    stock = state.get_kv_cache_spec

    def get_kv_cache_spec(*args: Any, **kwargs: Any) -> StageStateSpec:
        return StageStateSpec.from_stock(stock(*args, **kwargs), stage)

    state.get_kv_cache_spec = get_kv_cache_spec


def state_of(layer: nn.Module) -> Any:
    """The part of a decoder layer that has a state; None if it has attention.

    Raises:
        UnsupportedModelError: it has several, or attention besides.
    """
    found = [module for module in layer.modules() if isinstance(module, MambaBase)]
    if not found:
        return None
    beside = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) > 1 or beside:
        raise UnsupportedModelError(
            f"eviction needs one layer with a state or one attention per layer, found {found + beside}: use "
            "method 'plc'"
        )
    return found[0]


def attention_of(layer: nn.Module) -> Any:
    """The attention of a decoder layer.

    Raises:
        UnsupportedModelError: it has none, several, or one of another kind.
    """
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1 or type(found[0]) not in (Attention, StagedAttention):
        raise UnsupportedModelError(
            "eviction and localizer kind 'attention' need one plain attention per layer, found "
            f"{found}: use method 'plc' and another localizer"
        )
    return found[0]
