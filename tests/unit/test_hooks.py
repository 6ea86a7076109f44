# SPDX-License-Identifier: Apache-2.0
"""Callbacks on a module's first import, with modules made for the test."""

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.supported_window import LAST
from vllm_crop.compat import hooks
from vllm_crop.compat.hooks import when_imported

PACKAGE = "crop_hook_probe"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the module `inner`, importable and not yet imported."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text('"""Made for a test."""\nVALUE = 1\n\n\ndef function():\n    return 2\n')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def inner(package: Path) -> str:
    """The name of the package's module."""
    return f"{package.name}.inner"


def test_the_callback_runs_right_after_the_import_on_the_finished_module(inner: str) -> None:
    seen: list[tuple[ModuleType, bool]] = []
    when_imported(inner, lambda module: seen.append((module, hasattr(module, "VALUE"))))
    assert seen == []
    module = importlib.import_module(inner)
    assert seen == [(module, True)]


def test_waiting_imports_neither_the_module_nor_its_package(inner: str) -> None:
    when_imported(inner, lambda module: None)
    assert inner not in sys.modules
    assert PACKAGE not in sys.modules


def test_a_loaded_module_is_handed_over_at_once(inner: str) -> None:
    module = importlib.import_module(inner)
    seen: list[ModuleType] = []
    when_imported(inner, seen.append)
    assert seen == [module]


def test_the_callback_runs_before_the_importing_code_goes_on(package: Path, inner: str) -> None:
    (package / "outer.py").write_text(f"from {inner} import VALUE\n")

    def double(module: Any) -> None:
        module.VALUE *= 2

    when_imported(inner, double)
    assert importlib.import_module(f"{PACKAGE}.outer").VALUE == 2


def test_further_imports_and_reloads_do_not_repeat_the_callback(inner: str) -> None:
    seen: list[ModuleType] = []
    when_imported(inner, seen.append)
    module = importlib.import_module(inner)
    importlib.import_module(inner)
    importlib.reload(module)
    assert seen == [module]


def test_several_callbacks_run_in_the_order_they_came(inner: str) -> None:
    order: list[int] = []
    when_imported(inner, lambda module: order.append(1))
    when_imported(inner, lambda module: order.append(2))
    when_imported(inner, lambda module: order.append(3))
    importlib.import_module(inner)
    assert order == [1, 2, 3]


def test_each_module_waits_for_itself(package: Path, inner: str) -> None:
    (package / "other.py").write_text("")
    seen: list[str] = []
    when_imported(inner, lambda module: seen.append(module.__name__))
    when_imported(f"{PACKAGE}.other", lambda module: seen.append(module.__name__))
    importlib.import_module(f"{PACKAGE}.other")
    assert seen == [f"{PACKAGE}.other"]
    importlib.import_module(inner)
    assert seen == [f"{PACKAGE}.other", inner]


def test_a_package_can_be_waited_for(package: Path) -> None:
    seen: list[str] = []
    when_imported(PACKAGE, lambda module: seen.append(module.__name__))
    importlib.import_module(f"{PACKAGE}.inner")
    assert seen == [PACKAGE]


def test_a_module_that_does_not_exist_still_raises_its_import_error(package: Path) -> None:
    when_imported(f"{PACKAGE}.missing", lambda module: pytest.fail("there is no such module"))
    with pytest.raises(ModuleNotFoundError, match=f"{PACKAGE}.missing"):
        importlib.import_module(f"{PACKAGE}.missing")


def test_an_error_in_a_callback_reaches_the_import(inner: str) -> None:
    def fail(module: ModuleType) -> None:
        raise RuntimeError("cannot be patched")

    when_imported(inner, fail)
    with pytest.raises(RuntimeError, match="cannot be patched"):
        importlib.import_module(inner)


def test_source_and_origin_of_the_module_stay_visible(package: Path, inner: str) -> None:
    when_imported(inner, lambda module: None)
    module = importlib.import_module(inner)
    assert module.__file__ == str(package / "inner.py")
    assert module.__spec__ is not None
    assert module.__spec__.origin == module.__file__
    assert "return 2" in inspect.getsource(module.function)


def test_the_finder_is_installed_once(inner: str) -> None:
    for _ in range(3):
        when_imported(inner, lambda module: None)
    ours = [finder for finder in sys.meta_path if type(finder).__module__ == when_imported.__module__]
    assert len(ours) == 1
    importlib.import_module(inner)


def test_looking_the_module_up_before_importing_it_loses_nothing(inner: str) -> None:
    seen: list[ModuleType] = []
    when_imported(inner, seen.append)
    assert importlib.util.find_spec(inner) is not None
    module = importlib.import_module(inner)
    assert seen == [module]


def test_an_import_that_succeeds_at_the_second_attempt_is_seen(package: Path, inner: str) -> None:
    source = (package / "inner.py").read_text()
    (package / "inner.py").write_text("raise ImportError('a dependency is missing')\n")
    seen: list[ModuleType] = []
    when_imported(inner, seen.append)
    with pytest.raises(ImportError, match="a dependency is missing"):
        importlib.import_module(inner)
    (package / "inner.py").write_text(source)
    importlib.invalidate_caches()
    module = importlib.import_module(inner)
    assert seen == [module]


def test_a_vllm_that_has_moved_everything_runs_as_if_we_were_not_installed(tmp_path: Path) -> None:
    """Every module we hook into is there and empty: it is imported, and what asks for pruning is refused."""
    hooked = re.findall(r'^        "(vllm[\w.]+)": _', Path(hooks.__file__).read_text(), re.M)
    assert len(hooked) == 7
    for module in hooked:
        file = tmp_path / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("MADE = True\n")
    for folder in {path.parent for path in tmp_path.rglob("*.py")} | {tmp_path / "vllm"}:
        (folder / "__init__.py").write_text(f"__version__ = {LAST!r}\n")
    program = f"""
import importlib, vllm_crop
vllm_crop.register()
assert all(importlib.import_module(module).MADE for module in {hooked!r})
from vllm_crop.compat.supported import require_supported
try:
    require_supported(())
except Exception as error:
    print(type(error).__name__, error)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("UnsupportedVersionError")
    for module in hooked:
        said = f"vllm-crop cannot hook into {module}: it has no "
        assert said in ran.stdout
        assert said in ran.stderr, "a warning, for a server that does not ask"
