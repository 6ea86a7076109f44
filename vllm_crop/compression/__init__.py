# SPDX-License-Identifier: Apache-2.0
"""Pre-LLM compression: visual features in, fewer embeddings out (torch only)."""
