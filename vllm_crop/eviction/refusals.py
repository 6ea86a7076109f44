# SPDX-License-Identifier: Apache-2.0
"""What eviction cannot work together with: refused at start, naming the flag."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from vllm_crop.errors import UnsupportedFlagError, UnsupportedVersionError, reads_settings
from vllm_crop.eviction.report import packed_layout

# The value of `scheduler_cls` where a server evicts.
SCHEDULER = "vllm_crop.eviction.scheduler.make_scheduler"
Check = Callable[[Any], bool]
_EVICTION = "eviction (--crop-config method 'ilp' or 'plc+ilp', or eviction_layers)"

# (flag, reason, whether the VllmConfig has it on). What stands in the way is said in the reason.
REFUSED: tuple[tuple[str, str, Check], ...] = (
    (
        "--pipeline-parallel-size",
        "rows that a stage has dropped would have to cross to the next worker",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
    ),
    (
        "--decode-context-parallel-size",
        "KV is divided among workers by token position, which later layers do not have",
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
    ),
    (
        "--prefill-context-parallel-size",
        "KV is divided among workers by token position, which later layers do not have",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
    ),
    (
        "--enable-expert-parallel",
        "workers exchange token counts once per step, not per layer",
        lambda config: config.parallel_config.enable_expert_parallel,
    ),
    (
        "--enable-eplb",
        "workers exchange token counts once per step, not per layer",
        lambda config: config.parallel_config.enable_eplb,
    ),
    (
        "--data-parallel-size with a mixture of experts",
        "workers exchange token counts once per step, not per layer",
        lambda config: config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe,
    ),
    (
        "--enable-dbo or --ubatch-size",
        "a step cut in two has no common row order",
        lambda config: config.parallel_config.use_ubatching,
    ),
    (
        "--enable-lora",
        "adapters are applied by row number, which dropping rows changes",
        lambda config: config.lora_config is not None,
    ),
    (
        "--speculative-config",
        "drafters read all rows and keep KV of their own",
        lambda config: config.speculative_config is not None,
    ),
    (
        "--kv-transfer-config",
        "KV connectors take block i for tokens i x block_size on",
        lambda config: config.kv_transfer_config is not None,
    ),
    (
        "--kv-offloading-size",
        "KV offloading takes block i for tokens i x block_size on",
        lambda config: bool(config.cache_config.kv_offloading_size),
    ),
    (
        "--kv-events-config",
        "events describe blocks by token position",
        lambda config: config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events,
    ),
    (
        "--disable-hybrid-kv-cache-manager",
        "later layers need KV cache groups of their own",
        lambda config: config.scheduler_config.disable_hybrid_kv_cache_manager is True,
    ),
    (
        "--kv-sharing-fast-prefill",
        "it leaves out rows of later layers by itself",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
    ),
    (
        "--offload-group-size",
        "each layer fetches the next one's weights, and a step can end before the last layer",
        lambda config: (
            config.offload_config.prefetch.offload_group_size > 0
            or config.offload_config.offload_backend == "prefetch"
        ),
    ),
    (
        "prefix caching of a model with linear attention (leave it off by --no-enable-prefix-caching)",
        "its states are cached by token position, which later layers do not have",
        lambda config: config.model_config.is_hybrid and config.cache_config.enable_prefix_caching,
    ),
    (
        "VLLM_KV_CACHE_LAYOUT with blocks outermost, of a model with linear attention",
        "states are packed into blocks otherwise than keys and values",
        lambda config: config.model_config.is_hybrid and packed_layout(),
    ),
    (
        "--enable-prompt-embeds",
        "the eviction travels in the prompt's token ids",
        lambda config: config.model_config.enable_prompt_embeds,
    ),
    (
        "--skip-tokenizer-init",
        "marker ids are chosen among those the tokenizer does not know",
        lambda config: config.model_config.skip_tokenizer_init,
    ),
    (
        "--runner pooling",
        "evicted tokens have no final hidden state to pool",
        lambda config: config.model_config.runner_type == "pooling",
    ),
    (
        "--scheduler-cls",
        "eviction brings a scheduler of its own",
        lambda config: config.scheduler_config.scheduler_cls is not None,
    ),
)

# vLLM settles these after the others, so a worker asks again.
REFUSED_GRAPHS: tuple[tuple[str, str, Check], ...] = (
    (
        "--compilation-config cudagraph_mode=FULL",
        "a graph of a mixed step replays with all rows; FULL_AND_PIECEWISE is fine",
        lambda config: captures_mixed_steps(config),
    ),
    (
        "VLLM_USE_BREAKABLE_CUDAGRAPH=1",
        "it captures steps that drop rows; vLLM may have switched it on by itself: set it to 0",
        lambda config: os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0"),
    ),
)


def refused_with_eviction() -> dict[str, str]:
    """Every refused flag with its reason."""
    return {flag: reason for flag, reason, _ in (*REFUSED, *REFUSED_GRAPHS)}


def refuse_flags(vllm_config: Any) -> None:
    """Refuse what the engine's configuration has on.

    Raises:
        UnsupportedFlagError: naming the first offending flag.
    """
    refuse_first((*REFUSED, *REFUSED_GRAPHS), vllm_config, _EVICTION)


def refuse_graphs(vllm_config: Any) -> None:
    """Refuse CUDA graphs that would replay steps with prefill, once vLLM has settled them.

    Raises:
        UnsupportedFlagError: naming the setting.
    """
    refuse_first(REFUSED_GRAPHS, vllm_config, _EVICTION)


def require_scheduler(vllm_config: Any) -> None:
    """Refuse to make a model whose engine was not prepared: its scheduler would know of no eviction.

    Raises:
        UnsupportedVersionError: vLLM has not called what compat/engine_hook.py put into its table.
    """
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if scheduler != SCHEDULER:
        raise UnsupportedVersionError(
            f"this vLLM has not prepared the engine for eviction (its scheduler is {scheduler}): it no "
            "longer looks into vllm.model_executor.models.config.MODELS_CONFIG_MAP; use method 'plc'"
        )


def captures_mixed_steps(vllm_config: Any) -> bool:
    """Whether steps with prefill replay a captured graph."""
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is not None and mode.mixed_mode().name == "FULL"


def refuse_first(entries: Sequence[tuple[str, str, Check]], vllm_config: Any, beside: str) -> None:
    """Refuse the first of some flags that is on, beside what it cannot be used with.

    Raises:
        UnsupportedFlagError: naming both.
    """
    for flag, reason, is_on in entries:
        with reads_settings():
            on = is_on(vllm_config)
        if on:
            raise UnsupportedFlagError(f"{flag} cannot be used with {beside}: {reason}")
