# SPDX-License-Identifier: Apache-2.0
"""What any server with this plugin builds on: configuration, processing, renderers, engine."""

from vllm_crop.compat.patches import (
    cli_flags,
    engine,
    input_processor,
    model_config,
    online_renderer,
    other_apis,
)
from vllm_crop.compat.points.point import UpstreamPoint

_PROCESSOR = "vllm.multimodal.processing.processor"
SERVER_POINTS = (
    UpstreamPoint("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",), cli_flags.REASON),
    UpstreamPoint("vllm.engine.arg_utils", "EngineArgs.from_cli_args", ("args",), cli_flags.REASON),
    UpstreamPoint("vllm.engine.arg_utils", "EngineArgs.create_model_config", ("self",), model_config.REASON),
    UpstreamPoint(
        "vllm.tokenizers.registry",
        "tokenizer_args_from_config",
        ("config",),
        "says which tokenizer, and so which renderer, 'auto' stands for",
    ),
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
        kind="coroutine",
    ),
    UpstreamPoint(
        "vllm.renderers.hf",
        "HfRenderer.render_messages",
        ("self", "messages", "params"),
        "sees the messages that a question is taken from",
    ),
    UpstreamPoint(
        "vllm.renderers.hf",
        "HfRenderer.render_messages_async",
        ("self", "messages", "params"),
        "the same for the API server",
        kind="coroutine",
    ),
    UpstreamPoint(
        "vllm.renderers.base", "BaseRenderer.warmup", ("self", "chat_params"), "asks the localizer once"
    ),
    UpstreamPoint(
        "vllm.renderers.base",
        "BaseRenderer.render_chat_async",
        ("self", "conversations", "chat_params"),
        "makes the localizer's own prompt",
        given=("prompt_extras",),
        kind="coroutine",
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
            kind="coroutine",
            passes_on=True,
        )
        for method in online_renderer.METHODS
    ),
    UpstreamPoint(
        "vllm.entrypoints.anthropic.serving",
        f"AnthropicServingMessages.{other_apis.METHOD}",
        ("anthropic_request",),
        other_apis.REASON,
        passes_on=True,
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
        passes_on=True,
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
    UpstreamPoint(
        "vllm.multimodal.image",
        "normalize_image",
        ("image",),
        "turns an image as vLLM does before its region",
    ),
    UpstreamPoint(
        "vllm.multimodal.image",
        "convert_image_mode",
        ("image", "to_mode"),
        "gives the localizer the colours that the model sees",
    ),
    UpstreamPoint(
        "vllm.multimodal.parse",
        "MultiModalDataParser._parse_image_data",
        ("self", "data"),
        "makes of what a request brings the images that are planned and localized, in its order",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.registry",
        "_ModelRegistry.register_model",
        ("self", "model_arch", "model_cls"),
        "names our model classes",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.config",
        "MODELS_CONFIG_MAP",
        (),
        "calls our part of the engine's configuration, which eviction and heat maps need",
        kind="table",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig.verify_and_update_config",
        ("vllm_config",),
        "is how it is called",
    ),
    *(
        UpstreamPoint(
            f"vllm.v1.engine.{module}",
            f"{made}.__init__",
            ("self", "vllm_config"),
            engine.REASON,
            passes_on=True,
        )
        for module, made in (("async_llm", "AsyncLLM"), ("llm_engine", "LLMEngine"))
    ),
    UpstreamPoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("self", "prompt", "sampling_params", "request_id"),
        "answers the server's own requests: the localizer's, those of shadow checks",
        given=("priority", "lora_request"),
        kind="async generator",
    ),
    UpstreamPoint(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.add_request",
        ("self", "request_id", "prompt", "params"),
        "answers the localizer's own request offline",
        given=("priority", "lora_request"),
    ),
    UpstreamPoint("vllm.v1.engine.llm_engine", "LLMEngine.step", ("self",), "the same"),
)
