# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this is made for: its version, and the shape of the points that are relied on."""

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_crop.compat.points import EVICTION_POINTS, HEAT_POINTS, UPSTREAM_POINTS, UpstreamPoint
from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedVersionError
from vllm_crop.families.registry import FAMILIES, family_of

_FIRST = Version("0.32.0")
SUPPORTED_VERSIONS = SpecifierSet(f">={_FIRST},<0.34")
UNTESTED = "VLLM_CROP_UNTESTED_VLLM"
_NO = ("", "0", "false", "no", "off")
# The files of vllm/model_executor/models that language models of the LLaVA families and InternVL are in.
_LANGUAGE_FILES = {
    "llama": ("llama",),
    "mistral": ("mistral", "llama"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3", "qwen2"),
}

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# What could not be hooked into in this process, by module (hooks.py).
_UNHOOKED: dict[str, str] = {}

logger = logging.getLogger("vllm.plugins.crop")


@dataclass(frozen=True)
class OtherVersion:
    """A vLLM outside the supported versions.

    Attributes:
        said: what is installed, what is supported, and how to try a newer one.
        tried: the environment says so: a warning, no refusal. Shapes are checked all the same.
    """

    said: str
    tried: bool


def judge_version(installed: str) -> OtherVersion | None:
    """What there is to say about a version of vLLM; None of a supported one."""
    number = _number(installed)
    # Builds between releases are newer than the release they are called by, or older than it.
    if number is not None and not number.is_prerelease and SUPPORTED_VERSIONS.contains(number):
        return None
    said = f"vllm-crop supports vllm{SUPPORTED_VERSIONS}, installed is {installed}"
    # A build without a number may be as new as any.
    if number is not None and number <= _FIRST:
        return OtherVersion(said, tried=False)
    is_between = number is not None and number.is_prerelease
    between = (
        ". It is a build between releases: of these versions only releases are tested" if is_between else ""
    )
    if os.environ.get(UNTESTED, "").strip().lower() in _NO:
        return OtherVersion(
            f"{said}, which is not tested: to try it, set {UNTESTED}=1 (functions of vLLM's that have "
            f"changed shape are refused all the same){between}",
            tried=False,
        )
    return OtherVersion(
        f"{said}, which is not tested and tried because {UNTESTED} is set{between}", tried=True
    )


def _number(installed: str) -> Version | None:
    """The version, None of a build that knows of none: "dev", or built where no tag could be seen."""
    try:
        number = Version(installed)
    except InvalidVersion:
        return None
    return None if number.is_devrelease and number.release <= (0, 1) else number


@functools.cache
def _warn_once(said: str) -> None:
    logger.warning("%s", said)


def require_supported(points: Iterable[UpstreamPoint] = UPSTREAM_POINTS) -> None:
    """Check version and shape of the installed vLLM; called when pruning is asked for.

    A newer version is warned of and not refused where the environment says so (`UNTESTED`).

    Raises:
        UnsupportedVersionError: naming what is installed and what is supported.
    """
    # Points import modules, which is when hooks may fail.
    problems = [said for point in points if (said := find_problem(point))] + unhooked()
    installed = _installed()
    other = judge_version(installed)
    if problems or (other is not None and not other.tried):
        raise UnsupportedVersionError("; ".join([_said_of(installed), *problems]))
    if other is not None:
        _warn_once(other.said)


def find_problem(point: UpstreamPoint) -> str | None:
    """What is wrong with one upstream point, or None."""
    try:
        found: Any = importlib.import_module(point.module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{point.module}.".startswith(f"{error.name}."):
            return f"{point.full_name} is gone"
        return f"{point.module} cannot be imported: {error}"
    except Exception as error:  # a library beneath vLLM is broken, in whatever way
        return f"{point.module} cannot be imported: {str(error) or type(error).__name__}"
    try:
        for part in point.name.split("."):
            found = getattr(found, part)
    except AttributeError:
        return f"{point.full_name} is gone"
    parameters = _parameters(found)
    named = tuple(one.name for one in parameters)
    required = {one.name for one in parameters if one.default is one.empty and one.kind not in _VARIABLE}
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    said = point.judge(_kind(found), named, required, takes_any)
    return f"{point.full_name} {said}" if said else None


def _kind(found: Any) -> str:
    """Of what is wrapped, as its signature is: some wrappers are ours."""
    found = inspect.unwrap(found) if callable(found) else found
    if inspect.iscoroutinefunction(found):
        return "coroutine"
    if inspect.isasyncgenfunction(found):
        return "async generator"
    if callable(found):
        return "function"
    return "table" if isinstance(found, MutableMapping) else type(found).__name__


def _parameters(found: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(found).parameters.values()) if callable(found) else []
    except ValueError:  # compiled functions may have none that can be seen
        return []


def note_unhooked(module: str, error: Exception) -> None:
    """Remember what could not be hooked into: such a vLLM serves as without us, and nothing is pruned."""
    lacks = getattr(error, "name", None) if isinstance(error, AttributeError) else None
    reason = f"it has no {lacks}" if lacks else f"{type(error).__name__}: {error}"
    _UNHOOKED[module] = f"vllm-crop cannot hook into {module}: {reason}"
    logger.warning(
        "%s. vLLM runs as if the plugin were not installed; supported is vllm%s",
        _UNHOOKED[module],
        SUPPORTED_VERSIONS,
    )


def unhooked() -> list[str]:
    """What could not be hooked into, of the modules that have been imported."""
    return list(_UNHOOKED.values())


def require_hooked() -> None:
    """Check that nothing has failed to be hooked into; called when pruning is asked for.

    Raises:
        UnsupportedVersionError: naming what has.
    """
    if problems := unhooked():
        raise UnsupportedVersionError("; ".join([_said_of(_installed()), *problems]))


def _installed() -> str:
    return str(importlib.import_module("vllm").__version__)


def _said_of(installed: str) -> str:
    other = judge_version(installed)
    return other.said if other else f"vllm-crop supports vllm{SUPPORTED_VERSIONS}, installed is {installed}"


def require_supported_for(config: CropConfig, hf_config: Any) -> None:
    """Check what any server needs, or, once it is known, what the served model needs.

    Args:
        hf_config: None before the model is known.

    Raises:
        UnsupportedVersionError: naming what is installed and what is supported.
    """
    heat = config.localizer.kind == "attention"
    points = [*UPSTREAM_POINTS, *(EVICTION_POINTS if config.stages else ()), *(HEAT_POINTS if heat else ())]
    if hf_config is None:
        require_supported(point for point in points if point.model_module is None)
        return
    served = served_modules(hf_config.to_dict(), hf_config.get_text_config().model_type)
    require_supported(point for point in points if point.model_module in served)


def served_modules(configuration: Mapping[str, Any], language: str) -> frozenset[str]:
    """vLLM's model files that a model is made of: another family's may be missing or broken.

    Args:
        configuration: of the checkpoint, as in its `config.json`.
        language: the `model_type` of its language model.

    Raises:
        UnsupportedModelError: no supported family.
    """
    family = FAMILIES[family_of(configuration)]
    return frozenset((*family.upstream_files, *_LANGUAGE_FILES.get(language, ())))
