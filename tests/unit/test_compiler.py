# SPDX-License-Identifier: Apache-2.0
"""A CPU that cannot compile is noticed before a request is, by compiling."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from vllm_crop.compat import compiler
from vllm_crop.errors import MissingCompilerError


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch remembers the compiler that it has found, and a folder that it has made."""
    from torch._inductor.cpp_builder import cpp_compiler_search

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cpp_compiler_search.cache_clear()


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder that programs are looked for in."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_a_complete_machine_is_silent(tmp_path: Path) -> None:
    compiler.try_compiler()
    compiler.require_compiler()
    assert list((tmp_path / "cache").glob("tmp*")) == []  # nothing is left behind


@pytest.mark.usefixtures("path")
def test_no_compiler() -> None:
    with pytest.raises(MissingCompilerError, match=r"no C\+\+ compiler was found.*apt-get install g\+\+"):
        compiler.try_compiler()


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    with pytest.raises(MissingCompilerError, match=r"Python\.h.*headers of Python 3\.\d+ .*python3-dev"):
        compiler.try_compiler()


def test_a_compiler_that_only_knows_its_version(path: Path) -> None:
    broken = path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "cc1: error: ill" >&2; exit 1; }\n')
    broken.chmod(0o755)
    with pytest.raises(MissingCompilerError, match=r"g\+\+ cannot compile .*: cc1: error: ill\. "):
        compiler.try_compiler()


def test_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(MissingCompilerError, match="set TORCHINDUCTOR_CACHE_DIR"):
        compiler.try_compiler()


@pytest.mark.usefixtures("path")
def test_who_compiles_nothing_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    compiler.require_compiler()
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(compiler, "try_compiler", lambda: pytest.fail("a GPU's server was asked to compile"))
    compiler.require_compiler()


def test_check_tries_it(path: Path) -> None:
    program = "from vllm_crop.commands.app import app; app(['check'])"
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PATH": str(path), "COLUMNS": "200"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert finished.returncode == 1, finished.stderr
    assert "Pruning would not start" in finished.stdout
    assert "apt-get install g++" in finished.stdout
