# SPDX-License-Identifier: Apache-2.0
"""What a worker does in a step, on vLLM's two model runners: what leaves which stage, whose map is made."""
