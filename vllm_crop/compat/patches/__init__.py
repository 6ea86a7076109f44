# SPDX-License-Identifier: Apache-2.0
"""One file per function of vLLM that is replaced: why, what, and when the patch can go."""
