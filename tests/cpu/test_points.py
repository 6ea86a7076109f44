# SPDX-License-Identifier: Apache-2.0
"""Every method of vLLM's that a class of ours stands in front of is a registered point."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from vllm_crop import eviction, frontend, heat, models, runners
from vllm_crop.compat.points import CPU_RUNNER_POINTS, EVICTION_POINTS, HEAT_POINTS, UPSTREAM_POINTS
from vllm_crop.compat.supported import find_problem

pytestmark = pytest.mark.vllm_runtime

POINTS = tuple(dict.fromkeys((*UPSTREAM_POINTS, *EVICTION_POINTS, *HEAT_POINTS, *CPU_RUNNER_POINTS)))
OURS = "vllm_crop."


def classes_of(package: ModuleType) -> Iterator[type[Any]]:
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for found in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(found) and found.__module__ == info.name:
                yield found


def plain(found: Any) -> Any:
    """The function of a method, however it is bound."""
    if isinstance(found, functools.cached_property):
        return found.func
    return found.fget if isinstance(found, property) else getattr(found, "__func__", found)


def overridden(made: type[Any]) -> Iterator[tuple[str, Any]]:
    """Each method that a class of ours has in front of one of vLLM's: ours by name, and theirs."""
    for place, own in enumerate(made.__mro__):
        if not own.__module__.startswith(OURS):
            continue
        for name, found in vars(own).items():
            if name.startswith("__") or not callable(plain(found)) or inspect.isclass(found):
                continue
            theirs = next(
                (vars(base)[name] for base in made.__mro__[place + 1 :] if name in vars(base)), None
            )
            if getattr(plain(theirs), "__module__", "").startswith("vllm."):
                yield f"{own.__qualname__}.{name}", plain(theirs)


def test_every_override_is_a_point() -> None:
    registered = []
    for point in POINTS:
        found: Any = importlib.import_module(point.module)
        for part in point.name.split("."):
            found = getattr(found, part)
        registered.append(inspect.unwrap(plain(found)) if callable(plain(found)) else found)
    every = [
        (ours, theirs)
        for package in (eviction, frontend, heat, models, runners)
        for made in classes_of(package)
        for ours, theirs in overridden(made)
    ]
    assert len(every) > 100
    missing = {
        f"{ours}: {theirs.__module__}.{theirs.__qualname__}"
        for ours, theirs in every
        if not any(inspect.unwrap(theirs) is one for one in registered)
    }
    assert not missing


def test_every_point_is_as_the_installed_vllm_has_it() -> None:
    assert not [said for point in POINTS if (said := find_problem(point))]
