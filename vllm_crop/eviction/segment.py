# SPDX-License-Identifier: Apache-2.0
"""The decoder layers of one stage, compiled by themselves where torch.compile is on.

As in vllm/model_executor/models/gemma3n.py, whose early and late layers run with different rows too.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.sequence import IntermediateTensors

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
        hidden_states, residual = layer(positions, hidden_states, residual)
        if index < len(additions):
            hidden_states = hidden_states + additions[index]
    if norm is not None:
        hidden_states, residual = norm(hidden_states, residual)
    assert residual is not None
    return hidden_states, residual
