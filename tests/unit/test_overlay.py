# SPDX-License-Identifier: Apache-2.0
"""`docker/cpu/overlay_ops.py`: which calls fit compiled operators."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.drift import sources

FILE = Path(__file__).parents[2] / "docker" / "cpu" / "overlay_ops.py"


@pytest.fixture(scope="module")
def overlay_ops() -> Any:
    spec = importlib.util.spec_from_file_location("overlay_ops", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "call", "said"),
    [
        ("attention.py", "attention_cpu(a, b)", None),
        ("attention.py", "attention_cpu(a, b, scale=c)", None),
        (
            "attention.py",
            "attention_cpu(a, b, factor=c)",
            "gives attention_cpu factor, compiled it takes q, k",
        ),
        ("attention.py", "attention_cpu(a)", "gives attention_cpu 1 arguments, compiled it takes 2 to 3"),
        ("attention.py", "attention_cpu.default(a)", "gives attention_cpu 1 arguments"),
        ("norm.py", "rms_norm(a, b)", "gives rms_norm 2 arguments, compiled it takes 1"),
        ("norm.py", "rms_norm(*many)", None),
        ("gpu.py", "only_with_cuda(a)", None),
        ("cpu_worker.py", "only_with_cuda(a)", "needs the operator only_with_cuda, which is not compiled"),
        ("other.py", "topk_cpu(a)", "needs the operator topk_cpu, which is not compiled"),
        ("cpu.py", "_moe_C.topk(a)", "needs the operator _moe_C::topk, which is not compiled"),
        ("gpu.py", "_moe_C.topk(a)", None),
        ("experts.py", "fused_experts_cpu(a, b)", None),  # known
    ],
)
def test_what_does_not_fit_is_said(overlay_ops: Any, file: str, call: str, said: str | None) -> None:
    compiled = {
        "attention_cpu": overlay_ops.Operator(2, ("q", "k", "scale")),
        "rms_norm": overlay_ops.Operator(1, ("x",)),
        "fused_experts_cpu": overlay_ops.Operator(1, ("x",)),
    }
    called = call if "C." in call else f"_C.{call}"
    found = overlay_ops.misfits(compiled, [], [(file, f"import torch\ntorch.ops.{called}\n")])
    assert len(found) == (said is not None)
    assert all(f"{file} {said}" in one for one in found)


def test_what_the_build_itself_calls_so_is_left_alone(overlay_ops: Any) -> None:
    files = [("cpu.py", "torch.ops._C.topk_cpu(a)\n")]
    assert overlay_ops.misfits({}, files, files) == []
    (found,) = overlay_ops.misfits({}, files, [("cpu.py", "torch.ops._C.other_cpu(a)\n")])
    assert "other_cpu" in found


@pytest.mark.parametrize("kind", ["the environment it runs in", "somebody's environment", "no environment"])
def test_no_folder_is_deleted_that_is_not_its_own(kind: str, tmp_path: Path) -> None:
    own = kind == "the environment it runs in"
    (tmp_path / "file").touch()
    if kind == "somebody's environment":
        (tmp_path / "pyvenv.cfg").touch()
    target = Path(sys.prefix) if own else tmp_path
    kept = sorted(target.iterdir())
    command = [sys.executable, str(FILE.with_name("overlay.py")), "0.33.0", str(target)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=FILE.parents[2])
    assert ran.returncode == 1
    assert "name another folder" in ran.stderr
    assert sorted(target.iterdir()) == kept


@pytest.mark.parametrize(
    ("said", "full"),
    [("0.33", "0.33.0"), ("0.33.1", "0.33.1"), ("0.34rc1", "0.34.0rc1"), ("0.34.0.post1", "0.34.0.post1")],
)
def test_a_version_is_written_as_wheels_do(said: str, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    import overlay

    assert overlay._full(said) == sources._full(said) == full
