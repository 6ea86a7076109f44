# SPDX-License-Identifier: Apache-2.0
"""Whether a server makes heat maps, and what it cannot do beside that: refused at start, naming the flag."""

from typing import Any

from vllm_crop.config import CropConfig
from vllm_crop.eviction.refusals import Check, captures_mixed_steps, refuse_first

# (flag, reason, whether the VllmConfig has it on).
REFUSED: tuple[tuple[str, str, Check], ...] = (
    (
        "--pipeline-parallel-size",
        "the layers it reads would be on several workers",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
    ),
    (
        "--prefill-context-parallel-size",
        "a prompt would be on several workers",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
    ),
    (
        "--enable-dbo or --ubatch-size",
        "a step cut in two has no common row order",
        lambda config: config.parallel_config.use_ubatching,
    ),
    (
        "--speculative-config",
        "a request would have several rows of logits",
        lambda config: config.speculative_config is not None,
    ),
    (
        "--enable-batch-sharded-sampling",
        "logits are divided among workers",
        lambda config: config.parallel_config.enable_batch_sharded_sampling,
    ),
    (
        "--kv-cache-dtype fp8",
        "queries and keys come quantised",
        lambda config: "fp8" in str(config.cache_config.cache_dtype),
    ),
    (
        "--compilation-config cudagraph_mode=FULL",
        "prompts would run in graphs, where nobody can look: leave it out, or take FULL_AND_PIECEWISE",
        captures_mixed_steps,
    ),
)


def makes_heat(hf_config: Any) -> bool:
    """Whether the server's localizer reads attention."""
    return CropConfig.from_mapping(hf_config.crop).localizer.kind == "attention"


def refused_with_attention() -> dict[str, str]:
    """Every refused flag with its reason."""
    return {flag: reason for flag, reason, _ in REFUSED}


def refuse_flags(vllm_config: Any) -> None:
    """Refuse what cannot work together with heat maps.

    Raises:
        UnsupportedFlagError: naming the flag.
    """
    refuse_first(REFUSED, vllm_config, "localizer.kind 'attention'")
