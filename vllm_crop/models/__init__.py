# SPDX-License-Identifier: Apache-2.0
"""The models in the places of vLLM's, and what makes them of those. Each is imported when it is asked for.

vLLM keeps what a model class can do in a file, under a hash of the module it is registered in, of a package
with all of its files (vllm/model_executor/models/registry.py). Registered in this one, a class is looked at
anew when a mixin in a file of its own has changed.
"""

from importlib import import_module
from typing import Any

from vllm_crop.families.registry import FAMILIES


def __getattr__(name: str) -> Any:
    """The model class of an architecture."""
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FAMILIES[name].module}"), name)
