# SPDX-License-Identifier: Apache-2.0
"""The V1 model runner's part, for CPUs without Triton only: everywhere else vLLM runs V2.

Follows vllm/v1/worker/cpu_model_runner.py and gpu_model_runner.py.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_crop.eviction.decoder import EvictingStep
from vllm_crop.eviction.markers import EvictionSettings, image_embeddings, image_placeholders
from vllm_crop.eviction.prompt_eviction import PromptEviction, read_markers
from vllm_crop.eviction.stage_inputs import (
    RunningEvictions,
    StageBatch,
    StageGroups,
    StageInputs,
    build_metadata,
    early_groups,
    evicting_step,
    groups_by_stage,
)
from vllm_crop.heat.refusals import makes_heat
from vllm_crop.heat.request import token_ids
from vllm_crop.heat.step import HeatRequest, HeatStep, heat_step

CPU = torch.device("cpu")


class CropCPUModelRunner(CPUModelRunner):
    """Rewrites what the later layers' attention reads, and knows whose heat maps a step makes."""

    attn_groups: Any

    def start_crop(self) -> None:
        """Second half of `__init__`: the worker makes the stock runner and turns it into this one."""
        self.eviction_settings = EvictionSettings.from_hf_config(self.model_config.hf_config)
        self.running = RunningEvictions(self.max_num_reqs, len(self.eviction_settings.stages))
        self._row_owners: list[str] = []
        self._evicting: EvictingStep | None = None
        self._makes_heat = makes_heat(self.model_config.hf_config)
        self._heat: HeatStep | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, and tell the model."""
        super().load_model(*args, **kwargs)
        model: Any = self.get_model()
        model.runner_is_ours = True

    def _update_states(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.finished_req_ids or scheduler_output.scheduled_new_reqs:
            self._row_owners = []  # an id may come back as another request
        return super()._update_states(scheduler_output, *args, **kwargs)

    def _zero_block_ids(self, block_ids: list[int], *args: Any, **kwargs: Any) -> None:
        """As upstream, which knows full attention by its spec, and the blocks of later stages too.

        A state may have been there before, whose bytes are any numbers; a kernel reads whole blocks.
        """
        super()._zero_block_ids(block_ids, *args, **kwargs)
        layers = self.compilation_config.static_forward_context
        for stage in groups_by_stage(self.kv_cache_config, len(self.eviction_settings.stages)):
            for group in stage.layers.keys() - stage.with_state:
                for name in stage.layers[group]:
                    layers[name].kv_cache[block_ids] = 0

    def _build_attention_metadata(self, **kwargs: Any) -> Any:
        self._evicting = self._heat = None
        num_reqs = self.input_batch.num_reqs
        if kwargs["num_scheduled_tokens"] is None:
            return super()._build_attention_metadata(**kwargs)
        scheduled = np.diff(self.query_start_loc.np[: num_reqs + 1]).astype(np.int64)
        computed = self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        evicts = self._evicts(num_reqs)
        views = self.running.views(np.arange(num_reqs), computed, scheduled) if evicts else []
        if self._makes_heat:
            asked = [self._heat_request(req_id) for req_id in self.input_batch.req_ids[:num_reqs]]
            left = [view.token_rows for view in views] or [None] * len(self.eviction_settings.stages)
            self._heat = heat_step(asked, computed, scheduled, left)
        if not evicts:
            return super()._build_attention_metadata(**kwargs)
        attn_groups = self.attn_groups
        stages = groups_by_stage(self.kv_cache_config, len(self.eviction_settings.stages))
        self.attn_groups = early_groups(attn_groups, stages)
        try:
            metadata, drafting = super()._build_attention_metadata(**kwargs)
        finally:
            self.attn_groups = attn_groups
        batches = [
            self._stage_batch(view, stage, kwargs["slot_mappings"])
            for view, stage in zip(views, stages, strict=True)
        ]
        for stage, batch in zip(stages, batches, strict=True):
            metadata.update(build_metadata(batch, stage.only(attn_groups), self.kv_cache_config))
        self._evicting = evicting_step(kwargs["num_tokens"], views, stages, batches, CPU)
        return metadata, drafting

    def _evicts(self, num_reqs: int) -> bool:
        owners = self.input_batch.req_ids[:num_reqs]
        if owners != self._row_owners:  # rows move when requests come and go
            for row, req_id in enumerate(owners):
                self.running.set(row, self._eviction(req_id))
            self._row_owners = list(owners)
        return self.running.any_in(np.arange(num_reqs))

    def _eviction(self, req_id: str) -> PromptEviction | None:
        state: Any = self.requests[req_id]
        if not hasattr(state, "crop_eviction"):
            placeholders = image_placeholders(state.mm_features)
            marker_ids = self.eviction_settings.marker_ids
            state.crop_eviction = read_markers(state.prompt_token_ids or (), placeholders, marker_ids)
        eviction: PromptEviction | None = state.crop_eviction
        return eviction

    def _heat_request(self, req_id: str) -> HeatRequest | None:
        state: Any = self.requests[req_id]
        if not hasattr(state, "crop_heat"):
            embeddings = image_embeddings(state.mm_features)
            asked = HeatRequest.of(state.sampling_params, len(state.prompt_token_ids or ()), embeddings)
            # Of a prompt that is evicted from, rows would be missing.
            state.crop_heat = None if self._eviction(req_id) is not None else asked
        request: HeatRequest | None = state.crop_heat
        return request

    def _stage_batch(
        self, view: StageInputs, stage: StageGroups, stock_slots: dict[int, torch.Tensor]
    ) -> StageBatch:
        num_reqs, num_rows = len(view.seq_lens), len(view.kv_indices)
        req_rows = np.arange(num_reqs) if view.req_rows is None else view.req_rows
        row_of_token = np.repeat(req_rows, np.diff(view.query_start_loc))
        tables, slots = {}, {}
        for group in stage.layers:
            table = self.input_batch.block_table[group]
            blocks = table.get_numpy_array()
            tables[group] = torch.from_numpy(blocks[req_rows])
            block_ids = blocks[row_of_token, view.kv_indices // table.block_size].astype(np.int64)
            slots[group] = torch.from_numpy(block_ids * table.block_size + view.kv_indices % table.block_size)
            if not view.evicts_rows:  # upstream's forward reads the slots from these buffers
                stock_slots[group][:num_rows] = slots[group]
        seq_lens = torch.from_numpy(view.seq_lens)
        query_start_loc = torch.from_numpy(view.query_start_loc)
        return StageBatch(
            num_reqs=num_reqs,
            num_tokens=num_rows,
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            max_query_len=int(np.diff(view.query_start_loc).max(initial=0)),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens,
            max_seq_len=int(view.seq_lens.max(initial=0)),
            kv_indices=torch.from_numpy(view.kv_indices),
            is_prefilling=torch.ones(num_reqs, dtype=torch.bool),
            block_tables=tables,
            slot_mappings=slots,
        )

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        evicting, self._evicting = self._evicting, None
        if evicting is not None:
            kwargs["evicting"] = evicting
        if self._heat is not None:
            kwargs["heat"] = self._heat
        return super()._model_forward(*args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream, with maps read as top log-probabilities.

        Where one request names the ids it wants the log-probabilities of, upstream's sampler of this runner
        gives the others none but their sampled token's. A map's ids are the only ones of its row.
        """
        heat, self._heat = self._heat, None
        if heat is None:
            return super()._sample(*args, **kwargs)
        metadata = self.input_batch.sampling_metadata
        own = {rows.batch_row for rows in heat.rows}
        if set(metadata.logprob_token_ids or ()) - own:
            # Another request names ids too: upstream then reads named ids only, the map's among them.
            return super()._sample(*args, **kwargs)
        most = max(len(token_ids(rows.request.num_cells)) for rows in heat.rows)
        self.input_batch.sampling_metadata = replace(
            metadata,
            logprob_token_ids=None,
            max_num_logprobs=max(metadata.max_num_logprobs or 0, most),
        )
        try:
            return super()._sample(*args, **kwargs)
        finally:
            self.input_batch.sampling_metadata = metadata


class CropCPUWorker(CPUWorker):
    """The value of `worker_cls` on a CPU with the V1 runner."""

    def init_device(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, with our runner."""
        super().init_device(*args, **kwargs)
        runner: Any = self.model_runner
        runner.__class__ = CropCPUModelRunner
        runner.start_crop()
