# SPDX-License-Identifier: Apache-2.0
"""The language model's layers, split at the eviction layers.

The layers are upstream's own (vllm/model_executor/models/llama.py); a step that evicts nothing runs through
upstream's forward, compiled or captured as it may be.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.eviction.kv_cache import PrunedAttentionSpec
from vllm_crop.eviction.settings import EvictionSettings
from vllm_crop.eviction.start_report import expected_grouping

# Decoders whose forward is: embed, then `layer(positions, hidden_states, residual)` each, then the norm.
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")


class StagedAttention(Attention):
    """Attention of a layer that runs without what its stage has evicted."""

    crop_stage: int
    crop_num_layers: int
    crop_stages: tuple[int, ...]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """A spec of its own from stage 1 on, so that vLLM allocates KV for kept tokens only."""
        spec = super().get_kv_cache_spec(vllm_config)
        if self.crop_stage:
            spec = PrunedAttentionSpec.from_full(spec, self.crop_stage, self.layer_name)
        if spec is None:
            return None
        grouping = expected_grouping(self.crop_num_layers, self.crop_stages, spec.block_size)
        return spec.copy_with_new_block_size(grouping.block_sizes[self.crop_stage])


@dataclass(frozen=True)
class LateRows:
    """A stage's rows in a step that drops some.

    Attributes:
        gather: `[num_rows]`, which rows of the stage before stay; None if all do.
        slot_mapping: per layer `[num_rows]`, where their KV goes.
    """

    gather: torch.Tensor | None
    slot_mapping: dict[str, torch.Tensor]


@dataclass(frozen=True)
class DroppingStep:
    """A step in which some stage runs with fewer rows than there are tokens.

    Attributes:
        num_tokens: rows without padding.
        rows: per stage from 1 on.
        final_rows: `[num_rows]`, the rows left after the last stage.
    """

    num_tokens: int
    rows: tuple[LateRows, ...]
    final_rows: torch.Tensor


class EvictingDecoder:
    """Runs a decoder of upstream in stages. Holds no weights of its own."""

    def __init__(self, decoder: Any, settings: EvictionSettings) -> None:
        """Give every attention layer its stage.

        Raises:
            UnsupportedModelError: the decoder is built in a way we do not follow.
        """
        if type(decoder).__name__ not in DECODERS:
            raise UnsupportedModelError(
                f"eviction in {type(decoder).__name__} is not supported, only in {', '.join(DECODERS)}: use "
                "method 'plc'"
            )
        self.decoder = decoder
        layers = list(self.decoder.layers)
        bounds = [0, *settings.stages, len(layers)]
        self.segments = [layers[start:stop] for start, stop in pairwise(bounds)]
        for stage, segment in enumerate(self.segments):
            for layer in segment:
                attention = _attention_of(layer)
                attention.__class__ = StagedAttention
                attention.crop_stage = stage
                attention.crop_num_layers, attention.crop_stages = len(layers), settings.stages

    def run(self, step: DroppingStep, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run a step that drops rows.

        Args:
            inputs_embeds: `[num_tokens with padding, hidden]`.
            positions: `[num_tokens with padding]`.

        Returns:
            `[num_tokens with padding, hidden]`: rows keep their places, those dropped are zero.
        """
        hidden, positions = inputs_embeds[: step.num_tokens], positions[: step.num_tokens]
        residual: torch.Tensor | None = None
        output = torch.zeros_like(inputs_embeds)
        hidden, residual = _run_layers(self.segments[0], positions, hidden, residual)
        for segment, rows in zip(self.segments[1:], step.rows, strict=True):
            if rows.gather is not None:
                hidden, residual, positions = (
                    hidden[rows.gather],
                    residual[rows.gather],
                    positions[rows.gather],
                )
            if not len(hidden):
                return output
            _set_slot_mapping(rows.slot_mapping)
            hidden, residual = _run_layers(segment, positions, hidden, residual)
        hidden, _ = self.decoder.norm(hidden, residual)
        output[step.final_rows] = hidden
        return output


def _run_layers(
    layers: Any, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    for layer in layers:
        hidden, residual = layer(positions, hidden, residual)
    assert residual is not None
    return hidden, residual


def _set_slot_mapping(slot_mapping: dict[str, torch.Tensor]) -> None:
    # The kernels that write KV take the number of rows from it (vllm/model_executor/layers/attention).
    in_context = get_forward_context().slot_mapping
    assert isinstance(in_context, dict)
    in_context.update(slot_mapping)


def _attention_of(layer: nn.Module) -> Any:
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1 or type(found[0]) is not Attention:
        raise UnsupportedModelError(
            f"eviction needs one plain attention per layer, found {found}: use method 'plc'"
        )
    return found[0]
