# SPDX-License-Identifier: Apache-2.0
"""Runs a function once a module has been imported, without importing it now."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


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
