# SPDX-License-Identifier: Apache-2.0
"""`docker/cpu/overlay_ops.py`: which calls fit compiled operators."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "docker" / "cpu" / "overlay_ops.py"
COMPILED = {"attention_cpu": (2, 3), "rms_norm": (1, 1), "fused_experts_cpu": (1, 1)}


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
        ("attention.py", "attention_cpu(a)", "gives attention_cpu 1 arguments, compiled it takes 2 to 3"),
        ("attention.py", "attention_cpu.default(a)", "gives attention_cpu 1 arguments"),
        ("norm.py", "rms_norm(a, b)", "gives rms_norm 2 arguments, compiled it takes 1"),
        ("norm.py", "rms_norm(*many)", None),
        ("gpu.py", "only_with_cuda(a)", None),
        ("cpu_worker.py", "only_with_cuda(a)", "needs the operator only_with_cuda, which is not compiled"),
        ("other.py", "topk_cpu(a)", "needs the operator topk_cpu, which is not compiled"),
        ("experts.py", "fused_experts_cpu(a, b)", None),  # known
    ],
)
def test_what_does_not_fit_is_said(overlay_ops: Any, file: str, call: str, said: str | None) -> None:
    found = overlay_ops.misfits(COMPILED, [], [(file, f"import torch\ntorch.ops._C.{call}\n")])
    assert len(found) == (said is not None)
    assert all(f"{file} {said}" in one for one in found)


def test_what_the_build_itself_calls_so_is_left_alone(overlay_ops: Any) -> None:
    files = [("cpu.py", "torch.ops._C.topk_cpu(a)\n")]
    assert overlay_ops.misfits(COMPILED, files, files) == []
    (found,) = overlay_ops.misfits(COMPILED, files, [("cpu.py", "torch.ops._C.other_cpu(a)\n")])
    assert "other_cpu" in found
