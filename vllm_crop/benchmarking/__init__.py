# SPDX-License-Identifier: Apache-2.0
"""What `vllm-crop bench` is made of: a server of its own, vLLM's load generator, a report."""
