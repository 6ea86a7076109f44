# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet in float32 on a CPU, where vLLM's kernels take bfloat16 only.

It stands for those kernels alone (vllm/model_executor/layers/mamba/ops/cpu/gdn_attention.py): which rows a
layer runs with, in what order, which state a request begins with and where it leaves it is vLLM's. So
whatever this project does to prompts is compared exactly, which bfloat16's rounding would hide. What the
kernels make of it is asked in tests/cpu/test_qwen3_5.py.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

_done: list[bool] = []


def install() -> None:
    """Have layers of float32 models run here; those of bfloat16 go on as they are."""
    if _done:
        return
    _done.append(True)
    import vllm.model_executor.layers.mamba.ops.cpu.gdn_attention as kernels
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _resolve_layer_name
    from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

    kernels.register_cpu_gdn_attention_ops()
    stock = torch.ops.vllm.cpu_gdn_attention_core

    def cpu_gdn_attention_core_of_tests(
        mixed_qkv: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        core_attn_out: torch.Tensor,
        layer_name: LayerNameType,
    ) -> None:
        if mixed_qkv.dtype != torch.float32:
            stock(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        context = get_forward_context()
        if context.attn_metadata is None:
            return
        layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
        _run(layer, context.attn_metadata[layer.prefix], mixed_qkv, b, a, core_attn_out)

    # torch.compile takes an operation as it is, and would read a function.
    direct_register_custom_op(
        cpu_gdn_attention_core_of_tests.__name__,
        cpu_gdn_attention_core_of_tests,
        mutates_args=["core_attn_out"],
        fake_impl=lambda mixed_qkv, b, a, core_attn_out, layer_name: None,
    )
    torch.ops.vllm.cpu_gdn_attention_core = torch.ops.vllm.cpu_gdn_attention_core_of_tests


def _run(
    layer: Any, metadata: Any, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor
) -> None:
    """Each request of a step by itself, from the state in its slot."""
    starts = metadata.non_spec_query_start_loc.tolist()
    slots = metadata.non_spec_state_indices_tensor.tolist()
    decodes = metadata.num_decodes
    begun = [True] * decodes
    if metadata.num_prefills:
        begun = [*begun, *metadata.has_initial_state[decodes:].tolist()]
    for request, goes_on in enumerate(begun):
        rows = slice(starts[request], starts[request + 1])
        conv, state = (cache[slots[request]] for cache in layer.kv_cache)
        if not goes_on:
            conv.zero_()
            state.zero_()
        seen = _convolved(layer, mixed_qkv[rows], conv)
        out[rows] = _delta_rule(layer, seen, b[rows], a[rows], state)


def _convolved(layer: Any, rows: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`[tokens, channels]` after the causal convolution, which begins with the rows `before` and leaves the
    last ones there."""
    weight = layer.conv1d.weight.view(rows.shape[1], 1, -1)
    width = weight.shape[-1] - 1
    if before.shape[0] != width:
        before = before.T
    padded = torch.cat([before, rows])
    before.copy_(padded[-width:])
    return F.silu(F.conv1d(padded.T[None], weight, layer.conv1d.bias, groups=rows.shape[1])[0].T)


def _delta_rule(
    layer: Any, rows: torch.Tensor, b: torch.Tensor, a: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """`[tokens, heads, size]` by transformers' rule; the state is read and left, `[heads, keys, values]`."""
    query, key, value = layer.rearrange_mixed_qkv(rows)
    times = value.shape[2] // key.shape[2]
    decay = -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)
    rule = torch_recurrent_gated_delta_rule if len(rows) == 1 else torch_chunk_gated_delta_rule
    found, after = rule(
        query.repeat_interleave(times, 2),
        key.repeat_interleave(times, 2),
        value,
        g=decay[None],
        beta=b.sigmoid()[None],
        initial_state=state[None].clone(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    state.copy_(after[0])
    return found[0]
