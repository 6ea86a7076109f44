# SPDX-License-Identifier: Apache-2.0
"""Hooks into vLLM in every process that loads plugins, as its modules are imported (see changes.py)."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vllm_crop.compat.engine_hook import config_hook
from vllm_crop.compat.patches import (
    cli_flags,
    engine,
    input_processor,
    model_config,
    online_renderer,
    other_apis,
)
from vllm_crop.compat.supported import note_unhooked, require_hooked, require_supported_for
from vllm_crop.families.registry import FAMILIES

Callback = Callable[[ModuleType], None]


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
        **dict.fromkeys(other_apis.MODELS, other_apis.keep_fields),
        **{one.module: partial(_patch_conversion, one) for one in other_apis.CONVERSIONS},
    }
    for module_name, hook in hooks.items():
        when_imported(module_name, _if_it_fits(hook))


def _if_it_fits(hook: Callback) -> Callback:
    """A hook whose failure is noted and does not reach vLLM, which may serve without pruning.

    It runs inside vLLM's own import: in a vLLM that has moved what it looks for, every server of an
    environment where this plugin is only installed would end there.
    """

    def guarded(module: ModuleType) -> None:
        try:
            hook(module)
        except Exception as error:  # whatever another vLLM answers to what we take for granted
            note_unhooked(module.__name__, error)

    return guarded


def _patch_engine_args(arg_utils: ModuleType) -> None:
    cli_flags.patch(arg_utils.EngineArgs, require_hooked, note_unhooked)
    model_config.patch(arg_utils.EngineArgs, require_supported_for)


def _patch_input_processor(module: ModuleType) -> None:
    input_processor.patch(module.InputProcessor)


def _patch_online_renderer(module: ModuleType) -> None:
    online_renderer.patch(module.OnlineRenderer)


def _patch_conversion(conversion: other_apis.Conversion, module: ModuleType) -> None:
    other_apis.patch(conversion, module, _keep_crop)


def _keep_crop(request: Any, chat: Any) -> None:
    importlib.import_module("vllm_crop.frontend.other_requests").keep_crop(request, chat)


def _patch_async_llm(module: ModuleType) -> None:
    engine.patch(module.AsyncLLM, partial(_attach, "ServingEngine"))


def _patch_llm_engine(module: ModuleType) -> None:
    engine.patch(module.LLMEngine, partial(_attach, "OfflineEngine"))


def _attach(kind: str, made: Any) -> None:
    attach = getattr(getattr(made, "renderer", None), "attach_engine", None)  # our renderer's only
    if attach is not None:
        attach(getattr(importlib.import_module("vllm_crop.frontend.own_request"), kind), made)


def _register_models(registry: ModuleType) -> None:
    for architecture in FAMILIES:
        registry.ModelRegistry.register_model(f"Crop{architecture}", f"vllm_crop.models:{architecture}")


def _register_config_hooks(config: ModuleType) -> None:
    hooks: dict[str, Any] = config.MODELS_CONFIG_MAP
    for architecture in FAMILIES:
        stock = hooks.get(architecture, config.VerifyAndUpdateConfig)
        hooks.setdefault(f"Crop{architecture}", config_hook(stock))


def when_imported(module_name: str, callback: Callback) -> None:
    """Call `callback(module)` now if the module is loaded, else right after its first import.

    Not to be called by the module itself, or by what it imports, while it is being imported.
    """
    module = sys.modules.get(module_name)
    if module is not None:
        callback(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.pending.setdefault(module_name, []).append(callback)


class _Finder:
    """Meta path finder that wraps the loader of the modules waited for."""

    def __init__(self) -> None:
        self.pending: dict[str, list[Callback]] = {}
        self._looking_up: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.pending or name in self._looking_up:
            return None
        self._looking_up.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking_up.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _NotifyingLoader(spec.loader, self.pending)
        return spec


class _NotifyingLoader(Loader):
    def __init__(self, loader: Loader, pending: dict[str, list[Callback]]) -> None:
        self.loader = loader
        self.pending = pending

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for callback in self.pending.pop(module.__name__, []):
            callback(module)


_finder = _Finder()
