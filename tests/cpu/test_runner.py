# SPDX-License-Identifier: Apache-2.0
"""These tests run on the model runner they are meant for."""

import os
from typing import Any

import pytest

from tests.cpu.conftest import Engine

pytestmark = pytest.mark.vllm_runtime


def base_modules(worker: Any) -> list[str]:
    return [base.__module__ for base in type(worker.model_runner).__mro__]


def test_the_intended_runner_runs(pool_engine: Engine) -> None:
    (modules,) = pool_engine.llm.collective_rpc(base_modules)
    is_v2 = "vllm.v1.worker.gpu.model_runner" in modules
    assert is_v2 == (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")
