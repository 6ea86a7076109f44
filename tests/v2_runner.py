# SPDX-License-Identifier: Apache-2.0
"""pytest plugin (`-p tests.v2_runner`): engines use vLLM's V2 model runner, the default on GPUs.

A CPU build has no Triton back end, which V2 needs: its kernels run in the interpreter instead. vLLM takes
Triton for usable if there is a back end named "cpu", and Triton wants exactly one driver that is active.

Interpreted kernels take their time: of the parity tests, which need the runner the same way for all families,
each scenario runs alone for two of them, and in one batch for all.
"""

import os
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the back end below exists in this process only

import triton.backends


class InterpretedDriver:
    """What Triton asks of a driver before it interprets."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=InterpretedDriver, compiler=None)

ALONE = ("llava", "qwen3_vl")  # plain RoPE; M-RoPE and deepstack
BATCH = "test_all_scenarios_in_one_batch"


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out single scenarios of the other families."""
    left_out = [item for item in items if item.path.name == "test_parity.py" and _in_batch_only(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _in_batch_only(item: Any) -> bool:
    family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
    return family is not None and str(family) not in ALONE and item.originalname != BATCH
