# SPDX-License-Identifier: Apache-2.0
"""Selects our model classes and renderer when `additional_config["crop"]` is set.

Why: the architecture is chosen while the model config is made, and only `hf_overrides` can change it then;
offline `LLM(additional_config=...)` has no other place to say so.
Replaces: EngineArgs.create_model_config (vllm/engine/arg_utils.py).
Remove when: a general plugin can see the engine's options before the model config is made.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from vllm_crop.compat.compiler import require_compiler
from vllm_crop.compat.hf_overrides import compose_hf_overrides
from vllm_crop.compat.refusals import (
    refuse_flags,
    refuse_foveation,
    refuse_localizer,
    refuse_model,
    refuse_shadow,
    refuse_tokenizer,
    served_geometry,
)
from vllm_crop.compression.files import with_compressor
from vllm_crop.config import CONFIG_KEY, CropConfig
from vllm_crop.errors import CropError, UnsupportedFlagError, UnsupportedVersionError, reads_settings
from vllm_crop.eviction.markers import attach_eviction
from vllm_crop.localizers.calibration import with_calibration

REASON = "selects the Crop architectures through hf_overrides when additional_config.crop is set"
STOCK_RENDERER = ("vllm.renderers.hf", "HfRenderer")
RENDERER = ("vllm_crop.frontend.renderer", "CropRenderer")
logger = logging.getLogger("vllm.plugins.crop")  # below vLLM's own logger, to share its handlers
_MARK = "_vllm_crop_model_config_patched"


def patch(engine_args: Any, require_supported: Callable[[CropConfig, Any], None]) -> None:
    """Wrap the method of the class EngineArgs, once.

    Args:
        require_supported: checks the installed vLLM, and then what of it the served model is built on.
    """
    if hasattr(engine_args, _MARK):
        return
    create_model_config = engine_args.create_model_config
    setattr(engine_args, _MARK, True)

    @functools.wraps(create_model_config)  # its signature is checked again by every engine of this process
    def create_model_config_with_crop(self: Any, *args: Any, **kwargs: Any) -> Any:
        additional = getattr(self, "additional_config", None)
        settings = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
        if settings is None:
            return create_model_config(self, *args, **kwargs)
        # Checked first as they were given: a wrong key is the operator's, not the file's.
        named = CropConfig.from_mapping(settings).localizer.calibration
        settings, calibration = with_calibration(settings)
        settings, compressor = with_compressor(settings)
        config = CropConfig.from_mapping(settings)
        require_supported(config, None)
        with reads_settings():
            refuse_flags(self)
            refuse_localizer(self, config.localizer)
            refuse_shadow(self, config.shadow)
            refuse_foveation(self, config)
        require_compiler()
        user_overrides = self.hf_overrides
        self.hf_overrides = compose_hf_overrides(config.model_dump(), user_overrides)
        try:
            model_config = create_model_config(self, *args, **kwargs)
        except ValidationError as error:
            raise_our_own(error)
            raise
        finally:
            self.hf_overrides = user_overrides
        require_supported(config, model_config.hf_config)
        if calibration is not None:
            calibration.require_fit(str(named), model_config.hf_config.to_dict())
        if compressor is not None:
            compressor.require_fit(str(config.resampler.weights), model_config.hf_config.to_dict())
            logger.info(
                "Compressor %s, trained for %s, fingerprint %s",
                *(config.resampler.weights, compressor.base_model, config.resampler.fingerprint),
            )
        with reads_settings():
            refuse_model(model_config, config)
            refuse_tokenizer(model_config)
        if config.stages:
            attach_eviction(model_config, config.stages)
            # The scheduler's start report counts with it, in a process that has no image processor.
            model_config.hf_config.crop_max_image_tokens = served_geometry(model_config).max_tokens
        logger.info("Visual token pruning is on for %s: %s", model_config.architecture, config)
        select_renderer(importlib.import_module("vllm.renderers.registry").RENDERER_REGISTRY.renderers)
        if config.localizer.kind == "attention" and config.localizer.layers is None:
            logger.warning(
                "Where this model looks nobody has measured: kind 'attention' reads layers in the middle of "
                "its depth. `vllm-crop calibrate --model %s` finds those that look, and how sure they are",
                model_config.model,
            )
        return model_config

    engine_args.create_model_config = create_model_config_with_crop


def raise_our_own(error: ValidationError) -> None:
    """Raise the CropError that pydantic has wrapped, if there is one: its sentence says it all."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, CropError):
            raise cause from None


def select_renderer(renderers: dict[str, tuple[str, str]]) -> None:
    """Put our renderer in the place of vLLM's default one (its register() would warn of that).

    Raises:
        UnsupportedFlagError: another plugin has done so before.
        UnsupportedVersionError: vLLM has another one by now.
    """
    found = renderers.get("hf")
    if found not in (STOCK_RENDERER, RENDERER):
        named = ".".join(found or ("nothing",))
        if found is None or named.startswith("vllm."):
            raise UnsupportedVersionError(
                f"this vLLM's default renderer is {named}, and ours is made of {'.'.join(STOCK_RENDERER)}"
            )
        raise UnsupportedFlagError(
            f"another plugin has replaced vLLM's renderer by {named}: name only one of the two in "
            "VLLM_PLUGINS"
        )
    renderers["hf"] = RENDERER
