# SPDX-License-Identifier: Apache-2.0
"""The language model's layers, split at the eviction layers.

The layers are upstream's own (vllm/model_executor/models/llama.py, qwen3.py and others: see DECODERS). With
torch.compile each stage's are compiled by themselves, as in gemma3n.py there, whose early and late layers run
with different rows too.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.eviction.layers import set_stage
from vllm_crop.eviction.markers import EvictionSettings
from vllm_crop.eviction.refusals import require_scheduler

# Decoders whose forward is: embed, then `layer(positions, hidden_states, residual)` each, then the norm.
# After the first layers visual features may be added to the hidden states (deepstack).
DECODERS = (
    *("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen3LLMModel", "Qwen3MoeLLMModel"),
    *("Glm4Model", "Glm4MoeModel", "Qwen3_5Model"),
)


@dataclass(frozen=True)
class StageRows:
    """A stage's rows in a step.

    Attributes:
        gather: `[num_rows]`, which rows of the stage before stay; None if all do.
        slot_mapping: per layer `[num_rows]`, where their KV goes; empty where no row has been dropped yet.
    """

    gather: torch.Tensor | None
    slot_mapping: dict[str, torch.Tensor]


@dataclass(frozen=True)
class EvictingStep:
    """A step in which some stage runs with fewer rows than there are tokens.

    Attributes:
        rows: per stage from 1 on.
        final_rows: `[num_rows]`, the rows left after the last stage.
    """

    rows: tuple[StageRows, ...]
    final_rows: torch.Tensor


class EvictingDecoder:
    """Runs a decoder of upstream in stages. Holds no weights of its own."""

    def __init__(self, decoder: Any, settings: EvictionSettings) -> None:
        """Give every layer its stage.

        Raises:
            UnsupportedModelError: the decoder is built in a way we do not follow.
        """
        if type(decoder).__name__ not in DECODERS:
            raise UnsupportedModelError(
                f"eviction in {type(decoder).__name__} is not supported, only in {', '.join(DECODERS)}: use "
                "method 'plc'"
            )
        self._between: torch.Tensor | None = None
        layers = list(decoder.layers)
        bounds = [0, *settings.stages, len(layers)]
        for stage, (start, stop) in enumerate(pairwise(bounds)):
            for layer in layers[start:stop]:
                set_stage(layer, stage, len(layers), settings.stages)
        self.segments = [
            make_segment(layers[start:stop], start, decoder.norm if stop == len(layers) else None)
            for start, stop in pairwise(bounds)
        ]

    def prepare_for_graphs(self, max_num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        """Allocate what segments give to each other when each replays captured graphs of its own.

        Their outputs lie in the memory pool that graphs share, and the next one may overwrite them
        (vllm/model_executor/models/gemma3n.py, fast_prefill_forward).
        """
        self._between = torch.empty(len(self.segments) - 1, 2, max_num_tokens, hidden_size, dtype=dtype)

    @property
    def runs_all_steps(self) -> bool:
        """Whether steps that drop nothing run in stages too.

        With torch.compile they do: the layers are compiled once, each stage by itself. Without, they run
        through upstream's forward.
        """
        return not self.segments[0].do_not_compile

    def run(
        self,
        evicting: EvictingStep | None,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        added: IntermediateTensors | None = None,
    ) -> torch.Tensor:
        """Run a step in stages.

        Args:
            evicting: None if all rows run through all layers.
            inputs_embeds: `[num_tokens with padding, hidden]`.
            positions: `[num_tokens with padding]`, or `[3, num_tokens with padding]` with M-RoPE.
            added: what is added to the rows after layer 0, 1, ..., `[num_tokens with padding, hidden]` each;
                no stage may begin before it is.

        Returns:
            `[num_tokens with padding, hidden]`: rows keep their places, those dropped are zero.
        """
        assert added is None or len(added) <= self.segments[0].num_layers
        with _graph_mode_restored() as context:
            hidden, residual = self.segments[0](positions, inputs_embeds, None, added)
            if evicting is None:
                for boundary, segment in enumerate(self.segments[1:]):
                    hidden, residual = self._across(boundary, hidden, residual, context)
                    hidden, residual = segment(positions, hidden, residual)
                return hidden
            output = torch.zeros_like(inputs_embeds)
            for boundary, (segment, rows) in enumerate(zip(self.segments[1:], evicting.rows, strict=True)):
                if rows.gather is not None:
                    hidden, residual = hidden[rows.gather], residual[rows.gather]
                    positions = _gather_positions(positions, rows.gather)
                    # The rows of this step have a number of their own: no captured graph fits them.
                    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
                if not len(hidden):
                    return output
                hidden, residual = self._across(boundary, hidden, residual, context)
                context.slot_mapping.update(rows.slot_mapping)
                hidden, residual = segment(positions, hidden, residual)
        output[evicting.final_rows] = hidden
        return output

    def _across(
        self, boundary: int, hidden: torch.Tensor, residual: torch.Tensor, context: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return hidden, residual
        assert self._between is not None
        copies = self._between[boundary, :, : len(hidden)]
        copies[0].copy_(hidden)
        copies[1].copy_(residual)
        return copies[0], copies[1]


def _gather_positions(positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The positions of some rows, with the strides of all: compiled code may have these built in.

    M-RoPE positions are a slice of a wider buffer (vllm/v1/worker/gpu/mm/rope.py).
    """
    gathered = positions[..., rows]
    return torch.empty_strided(
        gathered.shape, positions.stride(), dtype=positions.dtype, device=positions.device
    ).copy_(gathered)


@contextmanager
def _graph_mode_restored() -> Iterator[Any]:
    """The forward context, whose graph mode is put back afterwards.

    Its slot mapping is made anew for each step; the kernels that write KV take the number of rows from it
    (vllm/model_executor/layers/attention).
    """
    context: Any = get_forward_context()
    mode = context.cudagraph_runtime_mode
    try:
        yield context
    finally:
        context.cudagraph_runtime_mode = mode


_ROWS = {"positions": -1, "hidden_states": 0, "residual": 0, "added": 0}  # M-RoPE positions are [3, rows]


def make_segment(layers: Sequence[Any], first: int, norm: Any | None) -> Any:
    """Layers that run one after another, as a module; each has a compiled form of its own.

    Args:
        first: the number of the first layer.
        norm: the decoder's last norm, for its last segment.
    """
    name = f"Layers{first}To{first + len(layers) - 1}"

    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # In a tuple, as they belong to the decoder: a module's own modules show up as its weights.
            self.of_decoder = (tuple(layers), norm)
            self.num_layers = len(layers)

    # vLLM finds compiled code in its cache by the name and the line of `forward`.
    code = types.FunctionType(_forward.__code__, _forward.__globals__, "forward", _forward.__defaults__)
    code.__qualname__ = f"{name}.forward"
    code.__annotations__ = dict(_forward.__annotations__)
    Segment.__name__ = Segment.__qualname__ = name
    setattr(Segment, "forward", code)  # noqa: B010
    with set_model_tag(name):
        return support_torch_compile(Segment, dynamic_arg_dims=_ROWS)()


def _forward(
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    added: IntermediateTensors | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    layers, norm = self.of_decoder
    additions = [] if added is None else list(added.tensors.values())
    for index, layer in enumerate(layers):
        hidden_states, residual = layer(positions=positions, hidden_states=hidden_states, residual=residual)
        if index < len(additions):
            hidden_states = hidden_states + additions[index]
    if norm is not None:
        hidden_states, residual = norm(hidden_states, residual)
    assert residual is not None
    return hidden_states, residual


def start_eviction(model: Any, vllm_config: VllmConfig) -> EvictingDecoder | None:
    """Mark the later layers of a model; None if the server evicts nothing.

    Args:
        model: has `language_model.model`, the decoder (vllm/model_executor/models/llava.py).

    Raises:
        UnsupportedModelError: the decoder is built in a way we do not follow.
        UnsupportedVersionError: the engine was not prepared for eviction.
    """
    settings = EvictionSettings.from_hf_config(vllm_config.model_config.hf_config)
    if not settings.stages:
        return None
    require_scheduler(vllm_config)
    decoder = EvictingDecoder(model.language_model.model, settings)
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_piecewise_cudagraphs():
        decoder.prepare_for_graphs(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.get_hidden_size(),
            vllm_config.model_config.dtype,
        )
    return decoder
