# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints, a file per family; LLaVA-1.5 and Qwen2.5-VL are what the benchmark serves too."""
