# SPDX-License-Identifier: Apache-2.0
"""What is installed here, and whether vLLM would prune with it: the facts behind `vllm-crop check`."""

import contextlib
import importlib
import io
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from pydantic import BaseModel

from vllm_crop import __version__
from vllm_crop.compat import hooks
from vllm_crop.compat.changes import CHANGES
from vllm_crop.compat.compiler import require_compiler
from vllm_crop.compat.points import CPU_RUNNER_POINTS, EVICTION_POINTS, HEAT_POINTS, UPSTREAM_POINTS
from vllm_crop.compat.refusals import REFUSED, refuse_for_geometry, uses_rust_front_end
from vllm_crop.compat.supported import (
    SUPPORTED_VERSIONS,
    find_problem,
    judge_version,
    served_modules,
    unhooked,
)
from vllm_crop.compression.files import with_compressor
from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError, InvalidConfigError, UnsupportedModelError
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.eviction.refusals import refused_with_eviction
from vllm_crop.eviction.report import block_size_of, recommended_layer, savings
from vllm_crop.families.checkpoint import CheckpointFileError, load_geometry, load_model_config
from vllm_crop.families.registry import FAMILIES, VisionGeometry, family_of
from vllm_crop.heat.refusals import refused_with_attention
from vllm_crop.localizers.calibration import SETTINGS as CALIBRATED
from vllm_crop.localizers.calibration import with_calibration
from vllm_crop.planning.foveation import tower_tokens

ENTRY_POINT_GROUP, ENTRY_POINT = "vllm.general_plugins", "crop"
ENDPOINT_GROUP = "vllm.endpoint_plugins"  # of the playground; added only where VLLM_PLUGINS names it
NOT_INSTALLED, BROKEN = "not installed", "broken"
_EXAMPLE_SIZE = (640, 480)


def describe_installation(model: str | None = None, crop_config: str | None = None) -> dict[str, Any]:
    """Everything `vllm-crop check` prints, as plain values; `problems` is empty when pruning would start.

    `warnings` has what is not tested and tried all the same.

    Args:
        model: a checkpoint to judge too, a directory or a name on the Hub.
        crop_config: settings to judge too, as JSON.
    """
    vllm_version, problems = _installed_vllm()
    other = None if problems else judge_version(vllm_version)
    problems += [other.said] if other and not other.tried else []
    upstream_points = [] if vllm_version in (NOT_INSTALLED, BROKEN) else _upstream_points(model)
    problems += [point["problem"] for point in upstream_points if point["problem"]]
    problems += unhooked()
    problems += _environment_problems()
    problems += [] if vllm_version in (NOT_INSTALLED, BROKEN) else _compiler_problems()
    checkpoint = describe_checkpoint(model) if model is not None else None
    if checkpoint and not checkpoint["supported"]:
        problems.append(checkpoint["reason"])
    files, serve_options = dict[str, dict[str, str]](), list[str]()
    try:
        files = {} if crop_config is None else judge_settings(crop_config, model)
        if model is not None and checkpoint and checkpoint["supported"]:
            serve_options = _serve_options(model, crop_config)
    except CropError as error:
        problems.append(str(error))
    return {
        "ok": not problems,
        "problems": problems,
        "warnings": [other.said] if other and other.tried else [],
        "versions": {
            "vllm-crop": __version__,
            "vllm": vllm_version,
            **{name: _version_of(name) for name in ("torch", "transformers")},
            "python": platform.python_version(),
        },
        "supported_vllm": str(SUPPORTED_VERSIONS),
        "entry_points": _found_entry_points(),
        "endpoint_plugins": _found_entry_points(ENDPOINT_GROUP),
        "vllm_plugins": os.environ.get("VLLM_PLUGINS"),
        "upstream_points": upstream_points,
        "changes": [asdict(change) for change in CHANGES],
        "architectures": sorted(FAMILIES),
        "refused": dict(REFUSED),
        "refused_with_eviction": refused_with_eviction(),
        "refused_with_attention": refused_with_attention(),
        "config": describe_config(CropConfig),
        "model": checkpoint,
        "calibration": files.get("calibration"),
        "compressor": files.get("compressor"),
        "crop_config": crop_config,
        "serve_options": serve_options,
    }


def _serve_options(model: str, crop_config: str | None) -> list[str]:
    """Options of `vllm serve` that a checkpoint does not start without; the settings are right."""
    options = list(FAMILIES[family_of(load_model_config(model))].serve_options)
    evicts = bool(CropConfig.from_mapping(json.loads(crop_config or "{}")).stages)
    if evicts and load_geometry(model).state_tokens:
        options.append("--no-enable-prefix-caching")
    return options


# What `check` says of a compressor's training.
_TRAINED = {
    "recipe": "recipe",
    "steps": "done",
    "questions a step": "batch",
    "data": "data",
    "rates": "rates",
}


def judge_settings(crop_config: str, model: str | None) -> dict[str, dict[str, str]]:
    """Read settings as a server does, and judge them by a checkpoint if one is given.

    Returns:
        What the files that they name say and whether they fit: "calibration", "compressor".

    Raises:
        CropError: the settings are wrong or do not suit the checkpoint, or a file of theirs cannot be used.
    """
    try:
        settings = json.loads(crop_config)
    except ValueError as error:
        raise InvalidConfigError(f"--crop-config is no JSON: {error}") from None
    named = CropConfig.from_mapping(settings).localizer.calibration
    settings, calibration = with_calibration(settings)
    settings, compressor = with_compressor(settings)
    weights = (settings.get("resampler") or {}).get("weights")
    if calibration is not None and model is not None:
        calibration.require_fit(str(named), load_model_config(model))
    if compressor is not None and model is not None:
        compressor.require_fit(str(weights), load_model_config(model))
    config = CropConfig.from_mapping(settings)
    if model is not None:
        with suppress(UnsupportedModelError, CheckpointFileError):  # said beside the model
            refuse_for_geometry(load_geometry(model), config)
    fits = "not compared: give --model" if model is None else f"yes, {model} has the same shape"
    found = {}
    if calibration is not None:
        found["calibration"] = {
            "file": str(named),
            "made for": calibration.model_name,
            "made on": str(calibration.provenance.get("date", "unknown")),
            "fits": fits,
            "settings": json.dumps({name: getattr(config.localizer, name) for name in CALIBRATED}),
        }
    if compressor is not None:
        revision, told = compressor.base_model_revision, compressor.training
        trained = (f"{name} {told[key]}" for name, key in _TRAINED.items() if told.get(key) is not None)
        found["compressor"] = {
            "weights": str(weights),
            "trained for": compressor.base_model + (f" at {revision}" if revision else ""),
            "trained": ", ".join(trained) or "nobody says how",
            "fits": fits,
            "fingerprint": str(config.resampler.fingerprint),
        }
    return found


def describe_checkpoint(model: str) -> dict[str, Any]:
    """Whether a checkpoint can be pruned, with its grid and what that saves, or why not."""
    try:
        geometry = load_geometry(model)
        grid = geometry.grid(*_EXAMPLE_SIZE)
    except CropError as error:
        return {"name": model, "supported": False, "reason": str(error)}
    return {
        "name": model,
        "supported": True,
        "image_size": list(_EXAMPLE_SIZE),
        **grid.to_json(),
        "layout": grid.describe(),
        "tokens_per_image": grid.num_tokens,
        "num_layers": geometry.num_layers,
        **_describe_pruning(grid.num_tokens, geometry),
    }


def _describe_pruning(num_tokens: int, geometry: VisionGeometry) -> dict[str, Any]:
    if not geometry.why_no_regions:
        return _describe_eviction(num_tokens, geometry)
    bounds = [geometry.max_tokens]
    while bounds[-1] // 2 >= geometry.fewest_tokens:
        bounds.append(bounds[-1] // 2)
    seen_in = [
        {"max_tokens": bound, "image_tokens": tower_tokens(geometry.small(*_EXAMPLE_SIZE, bound))}
        for bound in bounds
    ]
    return {"why_no_regions": geometry.why_no_regions, "budgets": seen_in}


def _describe_eviction(num_tokens: int, geometry: VisionGeometry) -> dict[str, Any]:
    num_layers = geometry.num_layers
    layer, looking = recommended_layer(num_layers, geometry.first_eviction_layer), geometry.looking_layers
    block_size = block_size_of(geometry.state_tokens)
    return {
        "eviction_layers": [layer],
        "kv_groups": len(predict_grouping(num_layers, (layer,), block_size, looking).groups),
        "savings": [asdict(saving) for saving in savings(num_tokens, num_layers, layer, block_size, looking)],
    }


def describe_config(settings: type[BaseModel], prefix: str = "") -> list[dict[str, Any]]:
    """Every key of a configuration with default and description, nested keys as `limits.max_...`."""
    described = []
    for name, field in settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            described += describe_config(type(default), f"{prefix}{name}.")
        else:
            described.append({"key": f"{prefix}{name}", "default": default, "description": field.description})
    return described


def _installed_vllm() -> tuple[str, list[str]]:
    """Version and problems. The module is asked: a CPU build may have no distribution called vllm."""
    try:
        with _quiet():
            return str(importlib.import_module("vllm").__version__), []
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            return NOT_INSTALLED, [f"vllm is not installed; vllm-crop supports vllm{SUPPORTED_VERSIONS}"]
        return BROKEN, [f"vllm cannot be imported: {error}"]
    except Exception as error:  # whatever a broken installation raises is what the user must see
        return BROKEN, [f"vllm cannot be imported: {error}"]


def _upstream_points(model: str | None) -> list[dict[str, Any]]:
    """Every point, or those that a server of this model is built on."""
    hooks.install()  # the points below import what is hooked into
    points = dict.fromkeys((*UPSTREAM_POINTS, *EVICTION_POINTS, *HEAT_POINTS, *CPU_RUNNER_POINTS))
    served = None if model is None else _served_modules(model)
    described = []
    for point in points:
        if served is not None and point.model_module is not None and point.model_module not in served:
            continue
        try:
            with _quiet():
                problem = find_problem(point)
        except Exception as error:  # importing vLLM's modules can fail in any way
            problem = f"{point.module} cannot be imported: {error}"
        described.append({"name": point.full_name, "reason": point.reason, "problem": problem})
    return described


def _served_modules(model: str) -> frozenset[str] | None:
    """vLLM's model files that a checkpoint needs; None if nobody can say, which is told beside the model."""
    try:
        configuration = load_model_config(model)
        text = configuration.get("text_config") or configuration
        return served_modules(
            configuration, text.get("model_type", "llama")
        )  # transformers' default of LLaVA
    except CropError:
        return None


def _environment_problems() -> list[str]:
    problems = []
    if ENTRY_POINT not in _found_entry_points():
        problems.append(f"no entry point {ENTRY_POINT!r} in {ENTRY_POINT_GROUP}: reinstall vllm-crop")
    selected = os.environ.get("VLLM_PLUGINS")
    if selected is not None and ENTRY_POINT not in selected.split(","):
        problems.append(
            f"VLLM_PLUGINS={selected!r} leaves out {ENTRY_POINT!r}: add it, or unset the variable"
        )
    if uses_rust_front_end():
        problems.append(f"VLLM_USE_RUST_FRONTEND is set: {REFUSED['VLLM_USE_RUST_FRONTEND=1']}")
    return problems


def _compiler_problems() -> list[str]:
    try:
        with _quiet():
            require_compiler()
    except CropError as error:
        return [str(error)]
    except Exception as error:  # vLLM's platform, or torch, may not answer here
        return [f"whether vLLM could compile on this machine cannot be said: {error}"]
    return []


def _found_entry_points(group: str = ENTRY_POINT_GROUP) -> dict[str, str]:
    return {found.name: found.value for found in entry_points(group=group)}


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what importing vLLM logs and prints out of the report."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
