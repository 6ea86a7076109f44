# SPDX-License-Identifier: Apache-2.0
"""One file per class of vLLM that is patched: why, what, and when the patch can go."""
