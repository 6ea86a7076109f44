# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL on plain transformers, layer by layer: every layer runs with the visual tokens it is given."""
