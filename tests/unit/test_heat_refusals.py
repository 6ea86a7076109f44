# SPDX-License-Identifier: Apache-2.0
"""What localizer kind 'attention' cannot work together with is refused by the name of its flag."""

from collections.abc import Callable
from typing import Any

import pytest
from test_eviction_refusals import CUDAGraphMode, engine_config, put

from vllm_crop.errors import UnsupportedFlagError
from vllm_crop.heat.refusals import makes_heat, refuse_flags, refused_with_attention

ATTENTION = {"localizer": {"kind": "attention"}}
SWITCHES: dict[str, Callable[[Any], None]] = {
    "--pipeline-parallel-size": put("parallel_config.pipeline_parallel_size", 2),
    "--prefill-context-parallel-size": put("parallel_config.prefill_context_parallel_size", 2),
    "--enable-dbo or --ubatch-size": put("parallel_config.use_ubatching", True),
    "--speculative-config": put("speculative_config", object()),
    "--enable-batch-sharded-sampling": put("parallel_config.enable_batch_sharded_sampling", True),
    "--kv-cache-dtype fp8": put("cache_config.cache_dtype", "fp8_e4m3"),
    "--compilation-config cudagraph_mode=FULL": put("compilation_config.cudagraph_mode", CUDAGraphMode.FULL),
}


def test_every_refused_flag_has_a_switch() -> None:
    assert list(refused_with_attention()) == list(SWITCHES)


@pytest.mark.parametrize("flag", SWITCHES)
def test_a_flag_is_refused_by_name(flag: str) -> None:
    config = engine_config()
    config.model_config.hf_config.crop = ATTENTION
    refuse_flags(config)
    SWITCHES[flag](config)
    with pytest.raises(UnsupportedFlagError) as caught:
        refuse_flags(config)
    assert str(caught.value).startswith(flag)
    assert refused_with_attention()[flag] in str(caught.value)


def test_only_servers_that_read_attention_make_maps() -> None:
    config = engine_config()
    assert not makes_heat(config.model_config.hf_config)
    config.model_config.hf_config.crop = ATTENTION
    assert makes_heat(config.model_config.hf_config)
