# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `vllm-crop`, one module each."""
