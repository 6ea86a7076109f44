# SPDX-License-Identifier: Apache-2.0
"""Answers through vLLM: an engine in this process, or any OpenAI-compatible endpoint."""
