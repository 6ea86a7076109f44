# SPDX-License-Identifier: Apache-2.0
"""Every private point of vLLM we build on: a row each, with the reason; checked at start (supported.py)."""

from dataclasses import dataclass

from vllm_crop.compat.patches import cli_flags, engine, input_processor, model_config, online_renderer


@dataclass(frozen=True)
class UpstreamPoint:
    """A function of vLLM we override, wrap or call, with the leading parameters it must have."""

    module: str
    name: str
    parameters: tuple[str, ...]
    reason: str

    @property
    def model_module(self) -> str | None:
        """The file of vllm/model_executor/models it is in; None elsewhere, and for what all models share."""
        name = self.module.removeprefix("vllm.model_executor.models.")
        return None if name in (self.module, "interfaces") else name


_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"


def _manager(method: str, parameters: str, reason: str) -> UpstreamPoint:
    return UpstreamPoint(_MANAGER, f"SingleTypeKVCacheManager.{method}", tuple(parameters.split()), reason)


def _model_state(method: str, parameters: str, reason: str) -> UpstreamPoint:
    return UpstreamPoint(_MODEL_STATE, f"DefaultModelState.{method}", tuple(parameters.split()), reason)


def _v1_runner(method: str, parameters: str, reason: str) -> UpstreamPoint:
    return UpstreamPoint(_V1_RUNNER, f"GPUModelRunner.{method}", tuple(parameters.split()), reason)


# What any server builds on; rows of model files count where that model is served.
_PROCESSOR = "vllm.multimodal.processing.processor"
UPSTREAM_POINTS = (
    UpstreamPoint("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",), cli_flags.REASON),
    UpstreamPoint("vllm.engine.arg_utils", "EngineArgs.from_cli_args", ("args",), cli_flags.REASON),
    UpstreamPoint("vllm.engine.arg_utils", "EngineArgs.create_model_config", ("self",), model_config.REASON),
    UpstreamPoint(
        _PROCESSOR,
        "BaseMultiModalProcessor.apply",
        ("self", "inputs", "timing_ctx"),
        "plans a request's images before anything is hashed or processed",
    ),
    UpstreamPoint(
        _PROCESSOR,
        "BaseMultiModalProcessor._get_mm_hashes",
        ("self", "inputs"),
        "keys caches by image and region",
    ),
    UpstreamPoint(
        _PROCESSOR,
        "BaseMultiModalProcessor._get_cache_missing_processor_kwargs",
        ("self", "inputs", "mm_is_cached"),
        "gives each image missing from the cache its own plan",
    ),
    UpstreamPoint(
        _PROCESSOR,
        "BaseMultiModalProcessor._apply_hf_processor_main",
        ("self", "mm_items", "hf_kwargs"),
        "sends the plan beside the pixels",
    ),
    UpstreamPoint(
        _PROCESSOR,
        "BaseMultiModalProcessor._get_mm_fields_config",
        ("self", "hf_inputs", "hf_processor_mm_kwargs"),
        "declares the plan's tensors",
    ),
    UpstreamPoint(
        _PROCESSOR,
        "BaseMultiModalProcessor._get_prompt_updates",
        ("self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
        "puts the planned number of placeholders into the prompt",
    ),
    UpstreamPoint(
        "vllm.multimodal.processing.context",
        "InputProcessingContext.get_merged_mm_kwargs",
        ("self", "kwargs"),
        "gives the server's own processor settings, which decide what the model sees",
    ),
    UpstreamPoint(
        "vllm.multimodal.parse",
        "ImageProcessorItems.get_image_size",
        ("self", "item_idx"),
        "gives an image's size, for its plan",
    ),
    UpstreamPoint(
        "vllm.multimodal.encoder_budget",
        "MultiModalBudget.get_encoder_budget",
        ("self",),
        "gives the number of tokens the vision tower was profiled with, which our batches keep to",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.interfaces",
        "SupportsMRoPE.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers tokens as in the unpruned prompt",
    ),
    UpstreamPoint(
        "vllm.renderers.base",
        "BaseRenderer.process_for_engine",
        ("self", "prompt", "arrival_time"),
        "sees prompt and images of offline requests before they are processed",
    ),
    UpstreamPoint(
        "vllm.renderers.base",
        "BaseRenderer.process_for_engine_async",
        ("self", "prompt", "arrival_time"),
        "the same for the API server",
    ),
    UpstreamPoint(
        "vllm.renderers.base",
        "BaseRenderer.render_messages",
        ("self", "messages", "params"),
        "sees the messages that a question is taken from",
    ),
    UpstreamPoint(
        "vllm.renderers.base",
        "BaseRenderer.render_chat_async",
        ("self", "conversations", "chat_params"),
        "makes the localizer's own prompt",
    ),
    UpstreamPoint(
        "vllm.renderers.base", "BaseRenderer.shutdown", ("self",), "ends shadow checks with the server"
    ),
    *(
        UpstreamPoint(
            "vllm.renderers.online_renderer",
            f"OnlineRenderer.{method}",
            ("self", "request"),
            online_renderer.REASON,
        )
        for method in online_renderer.METHODS
    ),
    *(
        UpstreamPoint(
            f"vllm.entrypoints.openai.{api}.protocol",
            f"{request}.to_sampling_params",
            ("self", most_tokens, "default_sampling_params"),
            "tells parameters that will be refused before images are localized",
        )
        for api, request, most_tokens in (
            ("chat_completion", "ChatCompletionRequest", "max_tokens"),
            ("completion", "CompletionRequest", "max_tokens"),
            ("responses", "ResponsesRequest", "default_max_tokens"),
        )
    ),
    UpstreamPoint(
        "vllm.sampling_params",
        "SamplingParams.verify",
        ("self", "model_config", "speculative_config", "structured_outputs_config", "tokenizer"),
        "tells parameters that will be refused before images are localized",
    ),
    UpstreamPoint(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
        input_processor.REASON,
    ),
    UpstreamPoint(
        "vllm.multimodal.cache",
        "BaseMultiModalProcessorCache.is_cached_item",
        ("self", "mm_hash"),
        "tells whether an image known by its name must be supplied again",
    ),
    UpstreamPoint(
        "vllm.multimodal.cache.lru",
        "LruKeyReplicatedSenderCache.get_and_update_item",
        ("self", "mm_item", "mm_hash"),
        "enters what a batch sends when it is sent, and not when it is processed",
    ),
    UpstreamPoint(
        "vllm.multimodal.cache",
        "BaseMultiModalProcessorCache.invalidate",
        ("self", "mm_hash"),
        "makes the cache forget what a refused request has not sent",
    ),
    UpstreamPoint(
        "vllm.multimodal.media.image",
        "ImageMediaIO.load_bytes",
        ("self", "data"),
        "decodes an image known by its name again",
    ),
    UpstreamPoint("vllm.v1.engine.async_llm", "AsyncLLM.__init__", ("self", "vllm_config"), engine.REASON),
    UpstreamPoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("self", "prompt", "sampling_params", "request_id"),
        "answers the server's own requests: the localizer's, those of shadow checks",
    ),
    UpstreamPoint("vllm.v1.engine.llm_engine", "LLMEngine.__init__", ("self", "vllm_config"), engine.REASON),
    UpstreamPoint(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.add_request",
        ("self", "request_id", "prompt", "params"),
        "answers the localizer's own request offline",
    ),
    UpstreamPoint("vllm.v1.engine.llm_engine", "LLMEngine.step", ("self",), "the same"),
    UpstreamPoint(
        "vllm.model_executor.models.llava",
        "LlavaForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_onevision",
        "LlavaOnevisionForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VLForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings, deepstack features beside them",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3_VisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3_VisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw_list"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration._process_image_pixels",
        ("self", "inputs"),
        "encodes the tiles that are seen of an image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration._merge_image_patch_embeddings",
        ("self", "image_size", "patch_embeddings"),
        "puts tiles together, those that were not seen from the whole image's",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_onevision",
        "LlavaOnevisionForConditionalGeneration._process_image_pixels",
        ("self", "inputs"),
        "encodes the tiles that are seen of an image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_onevision",
        "LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings",
        ("self", "image_size", "patch_embeddings"),
        "puts tiles together, those that were not seen from the whole image's",
    ),
)

# The V2 model runner's part of eviction and of heat maps.
_MODEL_STATE_POINTS = (
    _model_state(
        "add_request",
        "self req_index new_req_data",
        "reads in the worker what a request evicts and whether it asks for a heat map",
    ),
    _model_state("remove_request", "self req_id", "forgets it"),
    _model_state("initialize_kv_cache", "self kv_cache_config block_tables", "finds the KV cache groups"),
    _model_state(
        "prepare_attn",
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config for_capture",
        "leaves later layers out of the stock attention metadata",
    ),
    _model_state(
        "prepare_inputs", "self input_batch req_states", "hands the rows to drop and to watch to the model"
    ),
)

# What eviction builds on, checked when a server is prepared to evict.
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
    _manager("allocate_external_computed_blocks", "self request_id", "refuses KV connectors"),
    _manager("cache_blocks", "self request num_tokens", "publishes blocks under keys of their own"),
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
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output"),
        "publishes partly filled blocks before finished requests are freed",
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
    ),
    *_MODEL_STATE_POINTS,
    UpstreamPoint(
        "vllm.v1.worker.gpu.block_table",
        "BlockTables.compute_slot_mappings",
        ("self", "idx_mapping", "query_start_loc", "positions", "num_tokens_padded", "out"),
        "computes the KV slots of stages",
    ),
)

# What localizer kind 'attention' builds on.
HEAT_POINTS = (
    UpstreamPoint(
        "vllm.model_executor.layers.attention.attention",
        "unified_attention_with_output",
        ("query", "key", "value", "output", "layer_name"),
        "calls a layer's attention outside compiled code, where queries and keys are seen",
    ),
    UpstreamPoint(
        "vllm.v1.attention.backend",
        "AttentionImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        "is wrapped in the layers that are watched",
    ),
    UpstreamPoint(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor.from_new_request",
        ("tokenizer", "request"),
        "brings back the log-probabilities of the ids that a request names, which carry the map",
    ),
    *_MODEL_STATE_POINTS,
)

# For CPUs without Triton, where the V1 model runner serves.
CPU_RUNNER_POINTS = (
    UpstreamPoint(
        "vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ("self",), "makes the model runner ours"
    ),
    _v1_runner("_update_states", "self scheduler_output", "notices requests that come and go"),
    _v1_runner(
        "_build_attention_metadata",
        "self num_tokens num_reqs max_query_len",
        "builds attention metadata of later layers",
    ),
    _v1_runner(
        "_model_forward",
        "self input_ids positions intermediate_tensors inputs_embeds",
        "hands the rows to drop and to watch to the model",
    ),
    _v1_runner("_sample", "self logits spec_decode_metadata", "reads maps as top log-probabilities"),
)
