# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's part: attention metadata of the stages for each step, through vLLM's ModelState.

Follows vllm/v1/worker/gpu/model_states/default.py. Captured graphs read the buffers they were captured with:
in FULL mode nothing but the contents of lengths and slots of stages changes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_crop.eviction.decoder import EvictingStep
from vllm_crop.eviction.kept_states import StateLayers, tables_in_graph
from vllm_crop.eviction.markers import EvictionSettings, image_embeddings, image_placeholders
from vllm_crop.eviction.prompt_eviction import IndexArray, read_markers
from vllm_crop.eviction.refusals import refuse_graphs
from vllm_crop.eviction.stage_inputs import (
    AttentionGroups,
    RunningEvictions,
    StageBatch,
    StageGroups,
    StageInputs,
    build_metadata,
    early_groups,
    evicting_step,
    groups_by_stage,
    to_device,
)
from vllm_crop.heat.refusals import makes_heat
from vllm_crop.heat.refusals import refuse_flags as refuse_heat_flags
from vllm_crop.heat.step import HeatRequest, HeatStep, heat_step


class CropModelState(DefaultModelState):
    """Keeps what running requests evict, and whose heat maps are made; rewrites what later layers read."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.model.runner_is_ours = True
        self.settings = EvictionSettings.from_hf_config(self.model_config.hf_config)
        self.running = RunningEvictions(self.max_num_reqs, len(self.settings.stages))
        self._nothing_runs = RunningEvictions(self.max_num_reqs, len(self.settings.stages))
        self._slots: dict[str, int] = {}
        self._evicting: EvictingStep | None = None
        self._makes_heat = makes_heat(self.model_config.hf_config)
        self._asked: dict[int, HeatRequest] = {}
        self._heat: HeatStep | None = None

    def add_request(self, req_index: int, new_req_data: NewRequestData, *args: Any, **kwargs: Any) -> None:
        """As upstream, and read the request's eviction from its prompt."""
        super().add_request(req_index, new_req_data, *args, **kwargs)
        placeholders = image_placeholders(new_req_data.mm_features)
        prompt = new_req_data.prompt_token_ids or ()
        eviction = read_markers(prompt, placeholders, self.settings.marker_ids)
        self.running.set(req_index, eviction)
        self._slots[new_req_data.req_id] = req_index
        self._asked.pop(req_index, None)
        embeddings = image_embeddings(new_req_data.mm_features)
        heat = self._makes_heat and HeatRequest.of(new_req_data.sampling_params, len(prompt), embeddings)
        if heat and eviction is None:  # of a prompt that is evicted from, rows would be missing
            self._asked[req_index] = heat

    def remove_request(self, req_id: str, *args: Any, **kwargs: Any) -> None:
        """As upstream; also for preempted requests, which are added again."""
        super().remove_request(req_id, *args, **kwargs)
        if (slot := self._slots.pop(req_id, None)) is not None:
            self.running.set(slot, None)
            self._asked.pop(slot, None)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables, *args: Any, **kwargs: Any
    ) -> None:
        """Find the stages' KV cache groups; make the buffers that graphs may capture."""
        if self.settings.stages:
            refuse_graphs(self.vllm_config)
        if self._makes_heat:
            refuse_heat_flags(self.vllm_config)
        super().initialize_kv_cache(kv_cache_config, block_tables, *args, **kwargs)
        self.stages = groups_by_stage(kv_cache_config, len(self.settings.stages))
        layers = self.vllm_config.compilation_config.static_forward_context
        self.batches = StageBatches(self.stages, block_tables, self.max_num_reqs, layers)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: AttentionGroups,
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As upstream for the first layers; metadata of each stage's own for the later ones."""
        # Three kinds of steps:
        #   nobody running evicts, no graph    all metadata is upstream's
        #   a graph is captured or replayed    stages have buffers of their own, which the graph reads: always
        #                                      written, and all rows kept, evicted ones without a slot
        #   otherwise                          stages get metadata of exactly the rows that are left
        self._evicting = self._heat = None
        in_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        is_real = input_batch.req_ids[0] in self._slots  # neither warm-up nor capture
        slots = input_batch.idx_mapping_np
        evicts = is_real and self.running.any_in(slots)
        splits = bool(self.stages) and (evicts or in_graph)
        early = early_groups(attn_groups, self.stages) if splits else attn_groups
        metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            early,
            kv_cache_config,
            for_capture,
            *args,
            **kwargs,
        )
        if not splits:
            self._find_heat(input_batch, is_real, [None] * len(self.stages))
            return metadata
        running = self.running if is_real else self._nothing_runs
        computed = input_batch.num_computed_tokens_np if is_real else np.zeros_like(slots)
        scheduled = input_batch.num_scheduled_tokens.astype(np.int64)
        views = running.views(slots, computed, scheduled, keep_rows=in_graph)
        self._find_heat(input_batch, is_real, [view.token_rows for view in views])
        batches = []
        for index, view in enumerate(views):
            if view.evicts_rows:
                batch = self.batches.fewer_rows(index, view, input_batch, block_tables)
            else:
                batch = self.batches.same_rows(
                    index, view, input_batch, block_tables, slot_mappings, in_graph, is_real
                )
                if for_capture:  # valid for whatever is replayed
                    batch.seq_lens[: batch.num_reqs] = input_batch.seq_lens[: batch.num_reqs]
                    batch = replace(batch, max_seq_len=self.max_model_len)
            own = self.stages[index].only(attn_groups)
            metadata.update(build_metadata(batch, own, kv_cache_config, for_capture))
            batches.append(batch)
        self._evicting = evicting_step(input_batch.num_tokens, views, self.stages, batches, self.device)
        return metadata

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As upstream, and the rows to drop, which the model's forward takes."""
        evicting, self._evicting = self._evicting, None
        inputs = super().prepare_inputs(input_batch, req_states, *args, **kwargs)
        heat, self._heat = self._heat, None
        own = {"evicting": evicting, "heat": heat}
        return {**inputs, **{name: given for name, given in own.items() if given is not None}}

    def _find_heat(
        self, input_batch: InputBatch, is_real: bool, token_rows: Sequence[IndexArray | None]
    ) -> None:
        if not self._asked or not is_real:
            return
        requests = [self._asked.get(slot) for slot in input_batch.idx_mapping_np.tolist()]
        computed = input_batch.num_computed_tokens_np.astype(np.int64)
        scheduled = input_batch.num_scheduled_tokens.astype(np.int64)
        self._heat = heat_step(requests, computed, scheduled, token_rows)


class CropHybridModelState(CropModelState, MambaHybridModelState):
    """The same for models some layers of which have a state."""


class StageBatches:
    """Makes the stages' batches, in buffers that captured graphs may hold on to."""

    def __init__(
        self,
        stages: Sequence[StageGroups],
        block_tables: BlockTables,
        max_num_reqs: int,
        layers: StateLayers,
    ) -> None:
        self.stages, self.block_tables, self._layers = stages, block_tables, layers
        self.device = block_tables.slot_mappings.device
        self._slots = [torch.empty_like(block_tables.slot_mappings) for _ in stages]
        self._seq_lens = torch.zeros(len(stages), max_num_reqs, dtype=torch.int32, device=self.device)

    def same_rows(
        self,
        index: int,
        view: StageInputs,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        in_graph: bool,
        is_real: bool,
    ) -> StageBatch:
        """The step's own batch, with lengths and slots of stages written into the buffers it is read from.

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
        # A graph takes every row for a continuation.
        is_prefilling = np.zeros(num_reqs, dtype=np.bool_)
        tables: Any = block_tables
        if in_graph and is_real:
            tables = tables_in_graph(view, self.stages[index], block_tables, self._layers)
        elif not in_graph:
            is_prefilling[:] = input_batch.is_prefilling_np
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
            is_prefilling=torch.from_numpy(is_prefilling),
            block_tables=tables,
            slot_mappings=slot_mappings,
        )

    def _write_slots(
        self,
        index: int,
        view: StageInputs,
        kv_indices: torch.Tensor,
        input_batch: InputBatch,
        slot_mappings: torch.Tensor,
    ) -> None:
        of_stages = self.block_tables.compute_slot_mappings(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            kv_indices.clamp(min=0),
            slot_mappings.shape[1],
            out=self._slots[index],
        )
        if (view.kv_indices < 0).any():
            of_stages[:, : len(kv_indices)].masked_fill_(kv_indices < 0, -1)
        for group in self.stages[index].layers:
            slot_mappings[group].copy_(of_stages[group])

    def fewer_rows(
        self, index: int, view: StageInputs, input_batch: InputBatch, block_tables: tuple[torch.Tensor, ...]
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
