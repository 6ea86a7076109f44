# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's batch (vllm/v1/worker/gpu/input_batch.py) as the later stages see it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_crop.eviction.late_view import LateView
from vllm_crop.eviction.step import StageBatch, StageGroups, to_device


class LateBatches:
    """Makes the stages' batches, in buffers that captured graphs may hold on to."""

    def __init__(self, stages: Sequence[StageGroups], block_tables: BlockTables, max_num_reqs: int) -> None:
        self.stages, self.block_tables = stages, block_tables
        self.device = block_tables.slot_mappings.device
        self._slots = [torch.empty_like(block_tables.slot_mappings) for _ in stages]
        self._seq_lens = torch.zeros(len(stages), max_num_reqs, dtype=torch.int32, device=self.device)

    def same_rows(
        self,
        index: int,
        view: LateView,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        in_graph: bool,
        is_real: bool,
    ) -> StageBatch:
        """The step's own batch, with late lengths and slots written into the buffers it is read from.

        The slots of a batch without requests stay as vLLM has set them: it writes no KV.
        """
        num_reqs = input_batch.num_reqs_after_padding if in_graph else input_batch.num_reqs
        num_tokens = input_batch.num_tokens_after_padding if in_graph else input_batch.num_tokens
        seq_lens = self._seq_lens[index]
        seq_lens[: len(view.seq_lens)] = to_device(view.seq_lens, self.device)
        seq_lens[len(view.seq_lens) :] = 0
        kv_indices = to_device(view.kv_indices, self.device)
        if is_real:
            self._write_slots(index, view, kv_indices, input_batch, slot_mappings)
        seq_lens_cpu = np.zeros(num_reqs, dtype=np.int32)
        seq_lens_cpu[: len(view.seq_lens)] = view.seq_lens
        return StageBatch(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc=input_batch.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1]),
            max_query_len=input_batch.max_query_len or int(input_batch.num_scheduled_tokens.max()),
            seq_lens=seq_lens,
            seq_lens_cpu=torch.from_numpy(seq_lens_cpu),
            max_seq_len=int(view.seq_lens.max()),
            kv_indices=kv_indices,
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
        )

    def _write_slots(
        self,
        index: int,
        view: LateView,
        kv_indices: torch.Tensor,
        input_batch: InputBatch,
        slot_mappings: torch.Tensor,
    ) -> None:
        late = self.block_tables.compute_slot_mappings(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            kv_indices.clamp(min=0),
            slot_mappings.shape[1],
            out=self._slots[index],
        )
        if (view.kv_indices < 0).any():
            late[:, : len(kv_indices)].masked_fill_(kv_indices < 0, -1)
        for group in self.stages[index].layers:
            slot_mappings[group].copy_(late[group])

    def fewer_rows(
        self, index: int, view: LateView, input_batch: InputBatch, block_tables: tuple[torch.Tensor, ...]
    ) -> StageBatch:
        """The rows and requests that are left; exact sizes, as such a step runs outside any graph."""
        idx_mapping, is_prefilling = input_batch.idx_mapping, input_batch.is_prefilling_np
        tables: Any = block_tables
        if view.req_rows is not None:
            req_rows = to_device(view.req_rows, self.device)
            idx_mapping, is_prefilling = idx_mapping[req_rows], is_prefilling[view.req_rows]
            tables = {group: block_tables[group][req_rows] for group in self.stages[index].layers}
        kv_indices = to_device(view.kv_indices, self.device)
        query_start_loc = to_device(view.query_start_loc, self.device)
        slot_mappings = self._slots[index]
        if len(kv_indices):
            slot_mappings = self.block_tables.compute_slot_mappings(
                idx_mapping, query_start_loc, kv_indices, len(kv_indices), out=slot_mappings
            )
        return StageBatch(
            num_reqs=len(view.seq_lens),
            num_tokens=len(kv_indices),
            query_start_loc=query_start_loc,
            query_start_loc_cpu=torch.from_numpy(view.query_start_loc),
            max_query_len=int(np.diff(view.query_start_loc).max(initial=0)),
            seq_lens=to_device(view.seq_lens, self.device),
            seq_lens_cpu=torch.from_numpy(view.seq_lens),
            max_seq_len=int(view.seq_lens.max(initial=0)),
            kv_indices=kv_indices,
            is_prefilling=torch.from_numpy(is_prefilling),
            block_tables=tables,
            slot_mappings=slot_mappings,
        )
