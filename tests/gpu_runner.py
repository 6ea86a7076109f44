# SPDX-License-Identifier: Apache-2.0
"""pytest plugin (`-p tests.gpu_runner`): the engine tests on a CUDA device, in float32 as on the CPU.

FlashAttention has no float32; vLLM's Triton attention has, if Triton multiplies float32 as such and not as
TF32. Graphs are captured and layers compiled with VLLM_CROP_TEST_GRAPHS=1, otherwise all is eager.
"""

import os

os.environ["TRITON_F32_DEFAULT"] = "ieee"
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

from tests.cpu import conftest

conftest.DEVICE_OPTIONS.update(
    attention_backend="TRITON_ATTN",
    mm_encoder_attn_backend="TORCH_SDPA",
    enforce_eager=os.environ.get("VLLM_CROP_TEST_GRAPHS") != "1",
    # Many engines share the device; nothing is measured of its memory.
    gpu_memory_utilization=0.05,
    kv_cache_memory_bytes=1 << 30,
)
