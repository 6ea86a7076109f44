# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this is made for, every private point of it we build on, and the one place that hooks in."""

import importlib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from vllm_crop.compat.eviction_hook import config_hook
from vllm_crop.compat.eviction_points import EVICTION_POINTS
from vllm_crop.compat.import_hooks import when_imported
from vllm_crop.compat.patches import cli_flags, engine, input_processor, model_config, online_renderer
from vllm_crop.compat.points import UpstreamPoint
from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedVersionError
from vllm_crop.families.registry import FAMILIES, family_of

SUPPORTED_VERSIONS = SpecifierSet(">=0.32.0,<0.33")
MODEL_MODULES = {
    "LlavaForConditionalGeneration": "vllm_crop.models.llava",
    "LlavaNextForConditionalGeneration": "vllm_crop.models.llava_next",
    "LlavaOnevisionForConditionalGeneration": "vllm_crop.models.llava_onevision",
    "Qwen2VLForConditionalGeneration": "vllm_crop.models.qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "vllm_crop.models.qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "vllm_crop.models.qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "vllm_crop.models.qwen3_vl_moe",
}


# The files of vllm/model_executor/models that a family's points are in, and those of language models.
_MODEL_FILES = {
    "LlavaForConditionalGeneration": ("llava",),
    "LlavaNextForConditionalGeneration": ("llava_next",),
    "LlavaOnevisionForConditionalGeneration": ("llava_onevision",),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl",),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl",),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "qwen3"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "qwen3_vl", "qwen3_moe"),
}
_LANGUAGE_FILES = {"llama": ("llama",), "mistral": ("mistral", "llama")}

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
        "answers the localizer's own request",
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
)


def require_supported(points: Iterable[UpstreamPoint] = UPSTREAM_POINTS) -> None:
    """Check version and shape of the installed vLLM; called when pruning is asked for.

    Raises:
        UnsupportedVersionError: naming what is installed and what is supported.
    """
    problems = [problem for point in points if (problem := find_problem(point))]
    installed = importlib.import_module("vllm").__version__
    if SUPPORTED_VERSIONS.contains(installed, prereleases=True) and not problems:
        return
    message = f"vllm-crop supports vllm{SUPPORTED_VERSIONS}, installed is {installed}"
    raise UnsupportedVersionError("; ".join([message, *problems]))


def find_problem(point: UpstreamPoint) -> str | None:
    """What is wrong with one upstream point, or None."""
    try:
        found: Any = importlib.import_module(point.module)
        for part in point.name.split("."):
            found = getattr(found, part)
    except AttributeError:
        return f"{point.module}.{point.name} is gone"
    except ModuleNotFoundError as error:
        if error.name is not None and f"{point.module}.".startswith(f"{error.name}."):
            return f"{point.module}.{point.name} is gone"
        return f"{point.module} cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:  # a library beneath vLLM is broken
        return f"{point.module} cannot be imported: {error}"
    parameters = tuple(inspect.signature(found).parameters)
    if parameters[: len(point.parameters)] != point.parameters:
        return f"{point.module}.{point.name} takes {parameters}, expected {point.parameters}"
    return None


def install() -> None:
    """Hook into vLLM as far as it is loaded; the rest follows as its modules are imported."""
    hooks: dict[str, Callable[[ModuleType], None]] = {
        "vllm.engine.arg_utils": _patch_engine_args,
        "vllm.model_executor.models.registry": _register_models,
        "vllm.model_executor.models.config": _register_config_hooks,
        "vllm.v1.engine.input_processor": _patch_input_processor,
        "vllm.renderers.online_renderer": _patch_online_renderer,
        "vllm.v1.engine.async_llm": _patch_async_llm,
        "vllm.v1.engine.llm_engine": _patch_llm_engine,
    }
    for module_name, hook in hooks.items():
        when_imported(module_name, hook)


def _patch_engine_args(arg_utils: ModuleType) -> None:
    cli_flags.patch(arg_utils.EngineArgs)
    model_config.patch(arg_utils.EngineArgs, _require_supported_for)


def _require_supported_for(config: CropConfig, hf_config: Any) -> None:
    """Check what any server needs, or, once it is known, what the served model needs."""
    points = [*UPSTREAM_POINTS, *(EVICTION_POINTS if config.stages else ())]
    if hf_config is None:
        require_supported(point for point in points if point.model_module is None)
        return
    served = served_modules(hf_config)
    require_supported(point for point in points if point.model_module in served)


def served_modules(hf_config: Any) -> frozenset[str]:
    """vLLM's model files that a model is made of: another family's may be missing or broken."""
    family = family_of(hf_config.to_dict())
    language = hf_config.get_text_config().model_type
    return frozenset((*_MODEL_FILES[family], *_LANGUAGE_FILES.get(language, ())))


def _patch_input_processor(module: ModuleType) -> None:
    input_processor.patch(module.InputProcessor)


def _patch_online_renderer(module: ModuleType) -> None:
    online_renderer.patch(module.OnlineRenderer)


def _patch_async_llm(module: ModuleType) -> None:
    engine.patch(module.AsyncLLM, partial(_attach, "ServingEngine"))


def _patch_llm_engine(module: ModuleType) -> None:
    engine.patch(module.LLMEngine, partial(_attach, "OfflineEngine"))


def _attach(kind: str, made: Any) -> None:
    attach = getattr(made.renderer, "attach_engine", None)  # our renderer's only
    if attach is not None:
        attach(getattr(importlib.import_module("vllm_crop.frontend.engine_localizer"), kind), made)


def _register_models(registry: ModuleType) -> None:
    for architecture in FAMILIES:
        registry.ModelRegistry.register_model(
            f"Crop{architecture}", f"{MODEL_MODULES[architecture]}:{architecture}"
        )


def _register_config_hooks(config: ModuleType) -> None:
    hooks: dict[str, Any] = config.MODELS_CONFIG_MAP
    for architecture in FAMILIES:
        hooks.setdefault(f"Crop{architecture}", config_hook(hooks.get(architecture)))
