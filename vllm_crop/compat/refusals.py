# SPDX-License-Identifier: Apache-2.0
"""What cannot work together with pruning: refused at start, naming the flag."""

import importlib
import math
import os
from typing import Any, NoReturn

from vllm_crop.compat.hf_overrides import settle_position_ids
from vllm_crop.config import CONFIG_KEY, CropConfig, FoveationConfig, ShadowConfig
from vllm_crop.errors import InvalidConfigError, UnsupportedFlagError
from vllm_crop.families.registry import VisionGeometry, check_layers_that_evict, geometry_from_configs
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.planner import LATE
from vllm_crop.planning.budget import BudgetError, method_evicts, retained_per_stage

REFUSED = {
    "VLLM_USE_RUST_FRONTEND=1": "the Rust front end replaces the Python API server that reads `crop`",
    "--video-pruning-rate": "EVS and VidCom2 put position channels into the embeddings we average",
    "--model-impl transformers|terratorch": "only vLLM's own model classes can be pruned",
    "--enable-tower-connector-lora": "adapters of the vision tower are not part of our feature cache's key",
    "--compilation-config cudagraph_mm_encoder": "a captured vision tower would bypass the compression",
    "--mm-processor-kwargs '{\"crop\": ...}'": "the server's settings go into --crop-config",
    "--tokenizer-mode other than auto|hf|slow": "another renderer would ignore the request's `crop`",
    "--enable-scale-out, --tokens-only": "prompts and image features come in past our processor",
    "--grpc": "its protocol has no field `crop`, and images come in processed, past our processor",
    "vllm run-batch": "it has no HTTP layer to take the field `crop` off a request",
    "localizer.adapter without --enable-lora": "the localizer could not answer with its adapter",
    "localizer.kind with --kv-transfer-config kv_role kv_producer|kv_consumer": (
        "two servers would look for the region of one request, and might find two: prompts of two lengths"
    ),
    "shadow.rate with --max-logprobs 0": "a check compares log-probabilities of first tokens",
    "shadow.rate with --logprobs-mode raw_logits|processed_logits": "logits of two prompts do not compare",
    "compression=foveate with --mm-encoder-tp-mode data": "pieces of images are one batch of the tower",
}


def refuse_flags(engine_args: Any) -> None:
    """Refuse options that are known before the model's configuration is.

    Raises:
        UnsupportedFlagError: naming the first offending flag.
    """
    if uses_rust_front_end():
        refuse("VLLM_USE_RUST_FRONTEND=1")
    if engine_args.video_pruning_rate:
        refuse("--video-pruning-rate")
    if engine_args.model_impl not in ("auto", "vllm"):
        refuse("--model-impl transformers|terratorch")
    if engine_args.enable_tower_connector_lora:
        refuse("--enable-tower-connector-lora")
    if engine_args.compilation_config.cudagraph_mm_encoder:
        refuse("--compilation-config cudagraph_mm_encoder")
    if CONFIG_KEY in (engine_args.mm_processor_kwargs or {}):
        refuse("--mm-processor-kwargs '{\"crop\": ...}'")


def refuse_localizer(engine_args: Any, config: LocalizerConfig) -> None:
    """Refuse a localizer that could never answer.

    Raises:
        UnsupportedFlagError: naming what is missing.
    """
    if config.kind in ("attention", "engine") and config.adapter is not None and not engine_args.enable_lora:
        refuse("localizer.adapter without --enable-lora")
    transfer = engine_args.kv_transfer_config
    if config.localizes and transfer is not None and transfer.kv_role in ("kv_producer", "kv_consumer"):
        refuse("localizer.kind with --kv-transfer-config kv_role kv_producer|kv_consumer")


def refuse_shadow(engine_args: Any, config: ShadowConfig) -> None:
    """Refuse shadow checks that could never compare anything.

    Raises:
        UnsupportedFlagError: naming the flag.
    """
    if config.rate and engine_args.max_logprobs == 0:
        refuse("shadow.rate with --max-logprobs 0")
    if config.rate and engine_args.logprobs_mode in ("raw_logits", "processed_logits"):
        refuse("shadow.rate with --logprobs-mode raw_logits|processed_logits")


def refuse_foveation(engine_args: Any, config: CropConfig) -> None:
    """Refuse to split a batch of pieces among ranks.

    Raises:
        UnsupportedFlagError: naming the flag.
    """
    if config.compression == "foveate" and engine_args.mm_encoder_tp_mode == "data":
        refuse("compression=foveate with --mm-encoder-tp-mode data")


def refuse_model(model_config: Any, config: CropConfig) -> None:
    """Refuse what only the finished model config shows.

    Raises:
        InvalidConfigError, UnsupportedFlagError: naming the flag and what to set instead.
    """
    if model_config.tokenizer_mode not in ("auto", "hf", "slow"):
        refuse("--tokenizer-mode other than auto|hf|slow")
    refuse_for_geometry(served_geometry(model_config), config)


def refuse_tokenizer(model_config: Any) -> None:
    """Refuse a tokenizer mode that vLLM has chosen by itself and whose renderer does not read `crop`.

    Raises:
        UnsupportedFlagError: naming the flag.
    """
    # Of a repository with files of Mistral's own, "auto" takes these, and a renderer that knows no `crop`.
    tokenizers: Any = importlib.import_module("vllm.tokenizers.registry")
    mode, *_ = tokenizers.tokenizer_args_from_config(model_config)
    if mode not in ("hf", "slow"):
        raise UnsupportedFlagError(
            f"vLLM chooses --tokenizer-mode {mode} for this model, whose renderer would ignore the request's "
            "`crop`: say --tokenizer-mode hf"
        )


def refuse_for_geometry(geometry: VisionGeometry, config: CropConfig) -> None:
    """Refuse settings that do not suit the checkpoint, however it is served.

    Raises:
        InvalidConfigError: naming the setting and what would do.
    """
    settle_position_ids(config.position_ids, geometry)
    if geometry.why_no_regions:
        _refuse_what_is_about_regions(geometry, config)
    if config.stages:
        refuse_budget(geometry, config)
    for name, field in FoveationConfig.model_fields.items():
        of_others = not geometry.why_no_foveation and name not in geometry.foveation_settings
        if of_others and getattr(config.foveation, name) != field.default:
            raise InvalidConfigError(
                f"--crop-config foveation.{name} has no effect on this model's vision tower: leave it out"
            )
    if config.compression == "foveate" and geometry.why_no_foveation:
        raise InvalidConfigError(
            "--crop-config compression 'foveate' needs a vision tower that can be shown parts of an image at "
            f"several sizes. This model's cannot: {geometry.why_no_foveation}. Use 'pool'"
        )
    if config.localizer.when_unsure == "late":
        earliest = math.ceil(LATE * geometry.num_layers)
        if not config.stages or config.stages[-1] < earliest:
            raise InvalidConfigError(
                "--crop-config localizer.when_unsure 'late' needs eviction_layers whose last one is at least "
                f"{earliest} for this model, got {list(config.stages)}"
            )
    if config.localizer.kind == "attention":
        layers = config.localizer.layers_of(geometry.num_layers, geometry.looking_layers)
        if layers[-1] >= geometry.num_layers:
            raise InvalidConfigError(
                f"--crop-config localizer.layers {layers}: the model's decoder layers are 0 to "
                f"{geometry.num_layers - 1}"
            )
        if strangers := sorted(set(layers) - set(geometry.looking_layers)):
            raise InvalidConfigError(
                f"--crop-config localizer.layers {layers}: of this model's layers only "
                f"{list(geometry.looking_layers)} have full attention, which maps are made of; "
                f"{strangers} have none"
            )


def _refuse_what_is_about_regions(geometry: VisionGeometry, config: CropConfig) -> None:
    about_regions = {
        "method": method_evicts(config.method),  # which brings eviction_layers along
        "eviction_layers": bool(config.stages),
        "localizer.kind": config.localizer.localizes,
        "compression": config.compression != "pool",
        "position_ids": config.position_ids == "original",
        "pruning_rate": config.pruning_rate != CropConfig.model_fields["pruning_rate"].default,
    }
    for name in (name for name, is_set in about_regions.items() if is_set):
        raise InvalidConfigError(
            f"--crop-config {name} is about parts of an image, which this model's are not pruned by: "
            f"{geometry.why_no_regions}. Leave it out; max_tokens, detail and history bound all of an image"
        )
    bounds = {
        "max_tokens": config.max_tokens,
        "detail_low_tokens": config.detail_low_tokens,
        "history.max_tokens": config.history and config.history.max_tokens,
    }
    for name, bound in bounds.items():
        if bound and bound < geometry.fewest_tokens:
            raise InvalidConfigError(
                f"--crop-config {name} {bound} is too few for this model: {geometry.fewest_tokens} at least"
            )


def served_geometry(model_config: Any) -> VisionGeometry:
    """The geometry of a server: its checkpoint's image processor, with the server's settings over it.

    How many tokens an image can have stands there and not in config.json: up to 16,384 for Qwen-VL, where
    transformers' default would be 1,280.
    """
    checkpoint: dict[str, Any] = getattr(model_config, "hf_image_processor_config", None) or {}
    multimodal = getattr(model_config, "multimodal_config", None)
    overrides: dict[str, Any] = getattr(multimodal, "mm_processor_kwargs", None) or {}
    overrides = {**overrides, **overrides.get("images_kwargs", {})}
    settings = {**checkpoint, **overrides}
    if isinstance(checkpoint.get("size"), dict) and isinstance(overrides.get("size"), dict):
        settings["size"] = {**checkpoint["size"], **overrides["size"]}
    return geometry_from_configs(model_config.hf_config.to_dict(), settings)


def refuse_budget(geometry: VisionGeometry, config: CropConfig) -> None:
    """Refuse eviction layers the model does not have, or that cannot meet the server's rate or bound.

    Raises:
        InvalidConfigError: naming layers or a rate that would do.
    """
    try:
        check_layers_that_evict(geometry, config.stages)
    except BudgetError as error:
        raise InvalidConfigError(f"--crop-config {error}") from None
    largest, bound = geometry.max_tokens, config.max_tokens
    try:
        retained_per_stage(
            largest,
            config.pruning_rate if bound is None else max(0.0, 1 - bound / largest),
            config.method,
            geometry.num_layers,
            config.stages,
        )
    except BudgetError as error:
        if bound is None:
            raise InvalidConfigError(f"--crop-config pruning_rate: {error}") from None
        raise InvalidConfigError(
            f"--crop-config max_tokens: {bound} of the {largest} tokens of the largest image are too few for "
            f"method {config.method!r} with eviction_layers {list(config.stages)}, which needs {error.least}"
        ) from None


def uses_rust_front_end() -> bool:
    """Whether the environment asks for vLLM's Rust front end."""
    return os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0")


def refuse(flag: str) -> NoReturn:
    """Refuse one of REFUSED.

    Raises:
        UnsupportedFlagError: naming it, with the reason.
    """
    raise UnsupportedFlagError(f"{flag} cannot be used with --plugin crop: {REFUSED[flag]}")
