# SPDX-License-Identifier: Apache-2.0
"""pytest plugin (`-p tests.v2_runner`): engines use vLLM's V2 model runner, the default on GPUs.

A CPU build has no Triton back end, which V2 needs: its kernels run in the interpreter instead. vLLM takes
Triton for usable if there is a back end named "cpu", and Triton wants exactly one driver that is active.

Interpreted kernels take their time: tests/selection.py leaves out more than for the V1 runner.
"""

import os
import types

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
