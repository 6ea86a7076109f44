# SPDX-License-Identifier: Apache-2.0
"""What eviction builds on, checked when a server is prepared to evict."""

from vllm_crop.compat.points.model_state import MODEL_STATE_POINTS
from vllm_crop.compat.points.point import UpstreamPoint

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"


def _manager(method: str, parameters: str, reason: str, passes_on: bool = False) -> UpstreamPoint:
    name = f"SingleTypeKVCacheManager.{method}"
    return UpstreamPoint(_MANAGER, name, tuple(parameters.split()), reason, passes_on=passes_on)


EVICTION_POINTS = (
    _manager(
        "get_num_blocks_to_allocate",
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
        "num_tokens_main_model",
        "counts blocks of kept tokens",
    ),
    _manager(
        "add_local_computed_blocks",
        "self request_id new_computed_blocks num_local_computed_tokens num_external_computed_tokens",
        "adopts cached blocks of kept tokens",
    ),
    _manager(
        "allocate_new_blocks",
        "self request_id num_tokens num_tokens_main_model",
        "allocates blocks of kept tokens",
    ),
    _manager("allocate_external_computed_blocks", "self request_id", "refuses KV connectors", passes_on=True),
    _manager(
        "cache_blocks", "self request num_tokens", "publishes blocks under keys of their own", passes_on=True
    ),
    _manager("new_step_starts", "self", "publishes partly filled blocks a step later"),
    _manager("pop_blocks_for_free", "self request_id", "forgets partly filled blocks"),
    _manager(
        "find_longest_cache_hit",
        "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block "
        "alignment_tokens",
        "looks blocks up by keys of their own",
    ),
    UpstreamPoint(
        "vllm.v1.core.block_pool",
        "BlockPool._insert_block_hash",
        ("self", "block_hash_with_group_id", "block", "num_tokens"),
        "inserts a block under a key of its own",
    ),
    UpstreamPoint(
        "vllm.v1.core.block_pool",
        "BlockPool.get_cached_block",
        ("self", "block_hash", "kv_cache_group_ids"),
        "finds the blocks under a key",
    ),
    UpstreamPoint(
        "vllm.v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry.check_kv_cache_spec_registry",
        ("kv_cache_spec",),
        "registers the built-in KV cache specs before ours",
    ),
    UpstreamPoint(
        "vllm.v1.kv_cache_interface",
        "replace_as",
        ("spec", "target_cls", "drop"),
        "turns a layer's KV cache spec into that of its stage",
    ),
    UpstreamPoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.add_request",
        ("self", "request"),
        "reads a request's eviction when it arrives",
    ),
    UpstreamPoint(
        "vllm.v1.core.sched.scheduler", "Scheduler.schedule", ("self",), "can be checked", passes_on=True
    ),
    UpstreamPoint(
        "vllm.v1.kv_cache_interface",
        "AttentionSpec.is_uniform_with_collection",
        ("self", "kv_cache_specs"),
        "keeps stages in groups of their own",
    ),
    UpstreamPoint(
        "vllm.v1.kv_cache_interface",
        "AttentionSpec.max_memory_usage_bytes",
        ("self", "vllm_config"),
        "counts what a request that evicts nothing takes",
    ),
    UpstreamPoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output"),
        "publishes partly filled blocks before finished requests are freed",
        passes_on=True,
    ),
    UpstreamPoint(
        "vllm.model_executor.layers.attention",
        "Attention.get_kv_cache_spec",
        ("self", "vllm_config"),
        "gives later layers a KV cache spec of their own",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
        "runs layers in stages",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.mistral",
        "MistralDecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
        "the same",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2",
        "Qwen2DecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
        "the same",
    ),
    *(
        UpstreamPoint(
            f"vllm.model_executor.models.{module}",
            f"{decoder}.forward",
            ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
            "is what the stages do: embeddings through every layer, then the norm",
        )
        for module, decoder in (("llama", "LlamaModel"), ("mistral", "MistralModel"), ("qwen2", "Qwen2Model"))
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3",
        "Qwen3DecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
        "runs layers in stages",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_moe",
        "Qwen3MoeDecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
        "runs layers in stages",
    ),
    *(
        UpstreamPoint(
            f"vllm.model_executor.models.{module}",
            f"{decoder}.forward",
            (
                *("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
                "deepstack_input_embeds",
            ),
            "is what the stages do: deepstack features are added after the first layers",
        )
        for module, decoder in (("qwen3_vl", "Qwen3LLMModel"), ("qwen3_vl_moe", "Qwen3MoeLLMModel"))
    ),
    *(
        UpstreamPoint(
            f"vllm.model_executor.models.{module}",
            f"{layer}.forward",
            ("self", "positions", "hidden_states", "residual"),
            "runs layers in stages",
        )
        for module, layer in (("glm4", "Glm4DecoderLayer"), ("glm4_moe", "Glm4MoeDecoderLayer"))
    ),
    *(
        UpstreamPoint(
            f"vllm.model_executor.models.{module}",
            f"{decoder}.forward",
            ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
            "is what the stages do: embeddings through every layer, then the norm",
        )
        for module, decoder in (("glm4", "Glm4Model"), ("glm4_moe", "Glm4MoeModel"))
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration._get_deepstack_input_embeds",
        ("self", "num_tokens"),
        "gives a step's deepstack rows, in buffers that captured graphs read",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration._clear_deepstack_input_embeds",
        ("self", "num_tokens"),
        "clears them after a step in stages",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_next",
        "Qwen3NextDecoderLayer.forward",
        ("self", "hidden_states", "residual", "positions"),
        "runs layers in stages",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_next",
        "Qwen3NextModel.forward",
        ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
        "is what the stages do: embeddings through every layer, then the norm",
    ),
    UpstreamPoint(
        "vllm.model_executor.layers.mamba.abstract",
        "MambaBase.get_kv_cache_spec",
        ("self", "vllm_config"),
        "gives the states of later layers a spec of their own",
    ),
    UpstreamPoint(
        "vllm.v1.kv_cache_interface",
        "MambaSpec.is_uniform_with_collection",
        ("self", "kv_cache_specs"),
        "keeps their stages in groups of their own",
    ),
    UpstreamPoint(
        "vllm.compilation.decorators",
        "support_torch_compile",
        ("cls", "dynamic_arg_dims"),
        "compiles the layers of each stage",
    ),
    UpstreamPoint(
        "vllm.compilation.backends", "set_model_tag", ("tag",), "keeps the stages' compiled code apart"
    ),
    UpstreamPoint(
        "vllm.v1.worker.gpu.attn_utils",
        "build_attn_metadata",
        (
            *("attn_groups", "num_reqs", "num_tokens", "query_start_loc_gpu", "query_start_loc_cpu"),
            *("max_query_len", "seq_lens", "max_seq_len", "block_tables", "slot_mappings", "kv_cache_config"),
        ),
        "builds attention metadata of later layers",
        given=("seq_lens_cpu_upper_bound", "positions", "is_prefilling", "for_cudagraph_capture"),
    ),
    *MODEL_STATE_POINTS,
    UpstreamPoint(
        "vllm.v1.worker.gpu.block_table",
        "BlockTables.compute_slot_mappings",
        ("self", "idx_mapping", "query_start_loc", "positions", "num_tokens_padded", "out"),
        "computes the KV slots of stages",
    ),
)
