# SPDX-License-Identifier: Apache-2.0
"""What the tests take from vLLM and its releases keep in different modules: the newest first."""

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

try:
    from vllm.v1.core.kv_cache_planning import _get_kv_cache_bytes_per_block as kv_cache_bytes_per_block
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_bytes_per_block as kv_cache_bytes_per_block
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

__all__ = ["get_kv_cache_groups", "kv_cache_bytes_per_block", "make_arg_parser"]
