# SPDX-License-Identifier: Apache-2.0
"""vLLM models and processors with pruning, one thin file per family."""
