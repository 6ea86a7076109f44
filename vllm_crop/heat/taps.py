# SPDX-License-Identifier: Apache-2.0
"""Watches the attention of some decoder layers, and writes the maps it makes into the logits.

The attention of a layer is an operation of vLLM's own, opaque to torch.compile and between the pieces of
piecewise graphs: its implementation runs as Python and sees queries and keys after norms and RoPE, for every
family alike (vllm/model_executor/layers/attention/attention.py, unified_attention_with_output).

A step of nothing but such requests ends at the last of these layers: an exception takes it out of the forward
pass, whatever that is made of.

The rule (docs/localization.md): attention of the prompt's last token, summed over heads, then normalised over
the image's tokens; of several layers the maximum, or a weighted product; of the tokens of a cell the
mean. The layers are all that are watched, or those of them that a request names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedModelError
from vllm_crop.eviction.layers import attention_of
from vllm_crop.families.text_layers import full_attention_layers
from vllm_crop.heat.request import NOWHERE, SCALE, STAMP
from vllm_crop.heat.step import HeatRows, HeatStep


class _AllSeen(Exception):
    """No layer after this one is needed by anybody in the step."""


class HeatTaps:
    """Maps of the requests of one step at a time."""

    def __init__(self, attentions: Sequence[tuple[int, int, Any]], may_leave: bool = False) -> None:
        """Watch some layers.

        Args:
            attentions: per layer its number, the stage of the decoder it is in, and its Attention; ascending.
            may_leave: whether a step may end at the last of them.

        Raises:
            UnsupportedModelError: a layer does not look at all that comes before.
        """
        self.num_layers = len(attentions)  # of a request that names none
        self.steps_left = 0
        self._last = attentions[-1][0]
        self._may_leave = may_leave
        self._step: HeatStep | None = None
        self._seen: dict[int, list[torch.Tensor]] = {}
        self._finished: list[tuple[HeatRows, torch.Tensor]] = []
        for number, stage, attention in attentions:
            _require_plain(number, attention)
            attention.impl.forward = self._tapped(number, stage, attention.impl, attention.impl.forward)

    @contextmanager
    def watching(self, step: HeatStep | None) -> Iterator[None]:
        """While the layers of a step run; leaves the block where the rest of them is not needed."""
        self._step, self._seen, self._finished = step, {}, []
        try:
            yield
        except _AllSeen:
            self.steps_left += 1
        finally:
            self._step = None
        if step is not None:
            self._finished = [
                (rows, torch.stack(self._seen[rows.batch_row]))
                for rows in step.rows
                if len(self._seen.get(rows.batch_row, ())) == self._expected(rows)
            ]

    def _expected(self, rows: HeatRows) -> int:
        """How many layers its map is made of; one that is named and not watched never comes."""
        named = rows.request.layers
        return self.num_layers if named is None else len(named)

    def write_into(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """Replace the logits of finished requests, `[num_reqs, vocab]`, by their maps, once.

        Args:
            logits: None on tensor parallel ranks that sample nothing.
        """
        finished, self._finished = self._finished, []
        if not finished:
            return logits
        sums = torch.cat([of_layers.flatten() for _, of_layers in finished])
        if get_tensor_model_parallel_world_size() > 1:  # each rank has some of the heads
            sums = tensor_model_parallel_all_reduce(sums)
        if logits is None:
            return None
        logits = logits.float()  # as the sampler reads them; others' values stay what they are
        start = 0
        for rows, of_layers in finished:
            stop = start + of_layers.numel()
            probabilities = _map(sums[start:stop].reshape(of_layers.shape), rows)
            start = stop
            row = logits[rows.batch_row]
            row.fill_(-torch.inf)
            row[: len(probabilities)] = probabilities.log()
        return logits

    def _tapped(self, number: int, stage: int, impl: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(layer: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            if self._step is not None:
                self._look(self._step, number, stage, query, key, impl.scale)
                if self._may_leave and self._step.all_leave and number == self._last:
                    raise _AllSeen
            return stock(layer, query, key, *args, **kwargs)

        return forward

    def _look(
        self, step: HeatStep, number: int, stage: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> None:
        for rows, start in zip(step.rows, step.starts[stage], strict=True):
            if not rows.request.reads(number):
                continue
            stop = start + rows.num_rows
            kept = rows.request.keys
            if not rows.first:
                kept.pop(number, None)  # of a prompt that was preempted half way
            if not rows.is_last:
                kept.setdefault(number, []).append(key[start:stop].clone())
                continue
            keys = torch.cat([*kept.pop(number, ()), key[start:stop]])
            if len(keys) != rows.request.num_prompt_tokens:
                continue  # a part of the prompt was never seen here: no map is better than a wrong one
            attention = attention_sums(query[stop - 1], keys, scale)
            image = rows.request.tokens_on(attention.device)
            self._seen.setdefault(rows.batch_row, []).append(attention[image])


def attention_sums(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one token to all before it and itself, summed over heads, `[tokens]` float32.

    Args:
        query: `[heads, size]`.
        keys: `[tokens, key heads, size]`; each serves as many heads in a row.
    """
    _, num_key_heads, size = keys.shape
    grouped = query.float().reshape(num_key_heads, -1, size)
    scores = torch.einsum("hgd,thd->hgt", grouped, keys.float()) * scale
    return scores.softmax(-1).sum((0, 1))


def _map(sums: torch.Tensor, rows: HeatRows) -> torch.Tensor:
    """The probabilities that stand for a map, from `[layers, embeddings]`."""
    request = rows.request
    shows = torch.from_numpy(request.cells != NOWHERE).to(sums.device)
    # A layer that gives the image nothing at all has no say.
    shares = sums / sums[:, shows].sum(-1, keepdim=True).clamp(min=torch.finfo(sums.dtype).tiny)
    cells = torch.from_numpy(request.cells).to(sums.device)
    inside = cells >= 0
    heat = shares.amax(0) if request.weights is None else _weighted(shares, request.weights, inside)
    totals = heat.new_zeros(request.num_cells).index_add_(0, cells[inside], heat[inside])
    counts = torch.bincount(cells[inside], minlength=request.num_cells)
    values = totals / counts.clamp(min=1) / SCALE
    return torch.cat([values, values.new_tensor([STAMP]), (1 - STAMP - values.sum())[None]])


def _weighted(shares: torch.Tensor, weights: tuple[float, ...], inside: torch.Tensor) -> torch.Tensor:
    """The product of the layers' shares, each to the power of its weight, with a sum of 1 over `inside`."""
    # Watched layers run in ascending order, as weights are given.
    scores = shares.new_tensor(weights) @ shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
    return scores.masked_fill(~inside, -torch.inf).softmax(0).nan_to_num(0.0)


def _require_plain(number: int, attention: Any) -> None:
    if getattr(attention, "query_quant", None) is not None:
        raise UnsupportedModelError(
            "localizer kind 'attention' cannot read quantised queries: leave out --kv-cache-dtype, or use "
            "kind 'engine'"
        )
    impl = attention.impl
    for name in ("sliding_window", "alibi_slopes", "logits_soft_cap", "sinks"):
        value = getattr(impl, name, None)
        # What backends write for "none": a number or a pair of them; anything else is a tensor of values.
        if isinstance(value, torch.Tensor) or value not in (None, 0, -1, (-1, -1)):
            raise UnsupportedModelError(
                f"localizer kind 'attention' cannot read layer {number}, which has {name}: name other layers "
                "in localizer.layers, or use kind 'engine'"
            )


def start_heat(model: Any, vllm_config: Any, stages: tuple[int, ...]) -> HeatTaps | None:
    """Watch layers of a model that has `language_model.model`, the decoder; None if nobody reads them.

    Args:
        stages: eviction layers of the server.

    Raises:
        UnsupportedModelError: a layer cannot be read.
    """
    config = CropConfig.from_mapping(vllm_config.model_config.hf_config.crop)
    if config.localizer.kind != "attention":
        return None
    decoder = list(model.language_model.model.layers)
    configuration = vllm_config.model_config.hf_config.to_dict()
    layers = config.localizer.layers_of(len(decoder), full_attention_layers(configuration, len(decoder)))
    return HeatTaps(
        [(layer, sum(layer >= first for first in stages), attention_of(decoder[layer])) for layer in layers],
        may_leave=_may_leave(vllm_config),
    )


def _may_leave(vllm_config: Any) -> bool:
    """Whether nobody waits for later layers.

    Experts on other ranks do, a transfer of KV layer by layer, and weights that are fetched layer by layer:
    each layer fetches another's, and its hook is put back when it returns (vllm/model_executor/offloader).
    """
    spread = vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.is_moe
    offload = vllm_config.offload_config
    fetched = (
        offload.offload_backend == "prefetch"
        or offload.prefetch.offload_group_size > 0
        or offload.uva.cpu_offload_gb > 0
    )
    return not spread and not fetched and vllm_config.kv_transfer_config is None
