# SPDX-License-Identifier: Apache-2.0
"""States of stages in steps that keep their rows: those that replay a captured graph of decoding.

vLLM lets a prompt's one-token chunk replay such a graph (vllm/v1/worker/gpu/model_runner.py), which takes
every row for a continuation. In a later stage the token may be evicted, and must not enter its request's
state; or be the first one that stays, and must not continue what the state's block held before.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from vllm_crop.eviction.stage_inputs import StageGroups, StageInputs, to_device

StateLayers = Mapping[str, Any]  # vLLM's static_forward_context


def tables_in_graph(
    view: StageInputs, stage: StageGroups, tables: Sequence[torch.Tensor], layers: StateLayers
) -> Any:
    """Block tables of a stage, one token per request: evicted ones go to the block that nobody reads.

    The states that begin in this step are cleared.
    """
    evicted = np.flatnonzero(view.kv_indices < 0)
    beginning = np.flatnonzero(view.kv_indices == 0)
    if not stage.with_state or not len(evicted) + len(beginning):
        return tables
    given = dict(enumerate(tables))
    for group in stage.with_state:
        table = given[group]
        if len(beginning):
            blocks = table[to_device(beginning, table.device), 0].long()
            _clear((layers[name].kv_cache for name in stage.layers[group]), blocks)
        if len(evicted):
            given[group] = table.index_fill(0, to_device(evicted, table.device), NULL_BLOCK_ID)
    return given


def _clear(states: Iterable[Sequence[torch.Tensor]], blocks: torch.Tensor) -> None:
    for of_layer in states:
        for state in of_layer:
            state.index_fill_(0, blocks, 0)
