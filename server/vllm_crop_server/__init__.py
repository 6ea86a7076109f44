# SPDX-License-Identifier: Apache-2.0
"""Everything of vllm-crop that speaks HTTP."""
