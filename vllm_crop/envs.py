# SPDX-License-Identifier: Apache-2.0
"""Environment variables of vllm-crop."""

import os


def debug() -> bool:
    """`VLLM_CROP_DEBUG=1`: check the bookkeeping of eviction after every scheduling step. Costs time."""
    return os.environ.get("VLLM_CROP_DEBUG", "0") not in ("", "0")
