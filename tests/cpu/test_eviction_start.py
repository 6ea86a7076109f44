# SPDX-License-Identifier: Apache-2.0
"""What eviction decides and refuses at start, by vLLM's own configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.conftest import Engine
from vllm_crop.errors import InvalidConfigError, UnsupportedVersionError

pytestmark = pytest.mark.vllm_runtime

EVICT = {"method": "ilp", "eviction_layers": [2], "pruning_rate": 0.5}
Configure = Callable[..., Any]


@pytest.fixture
def configure(deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """The configuration of `vllm serve` with eviction and more options, as far as the engine's start."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def run(*options: str, crop: dict[str, Any] = EVICT) -> Any:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        fixed = ["--model", str(deep_checkpoint), "--dtype", "float32", "--max-model-len", "2048"]
        args = parser.parse_args([*fixed, "--crop-config", json.dumps(crop), *options])
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()

    return run


def test_what_the_engine_gets(configure: Configure) -> None:
    config = configure("--enforce-eager")
    assert config.scheduler_config.scheduler_cls == "vllm_crop.eviction.scheduler.make_scheduler"
    if not config.use_v2_model_runner:
        assert config.parallel_config.worker_cls == "vllm_crop.runners.v1.CropCPUWorker"
    written = config.model_config.hf_config.crop_eviction
    assert written["stages"] == [2]
    assert written["marker_ids"] == [319]  # the last padded row of the vocabulary


def test_without_eviction_nothing_of_it_is_there(configure: Configure) -> None:
    config = configure("--enforce-eager", crop={"method": "plc"})
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert not hasattr(config.model_config.hf_config, "crop_eviction")


REFUSED = {
    "--pipeline-parallel-size": ("--pipeline-parallel-size", "2"),
    "--decode-context-parallel-size": ("--tensor-parallel-size", "2", "--decode-context-parallel-size", "2"),
    "--enable-dbo or --ubatch-size": ("--ubatch-size", "2"),
    "--enable-lora": ("--enable-lora",),
    "--speculative-config": (
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}',
    ),
    "--kv-transfer-config": (
        "--kv-transfer-config",
        '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',
    ),
    "--kv-offloading-size": ("--kv-offloading-size", "1"),
    "--kv-events-config": ("--kv-events-config", '{"enable_kv_cache_events": true}'),
    "--disable-hybrid-kv-cache-manager": ("--disable-hybrid-kv-cache-manager",),
    "--kv-sharing-fast-prefill": ("--kv-sharing-fast-prefill",),
    "--enable-prompt-embeds": ("--enable-prompt-embeds",),
    "--skip-tokenizer-init": ("--skip-tokenizer-init",),
    "--scheduler-cls": ("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"),
    "--worker-cls": ("--worker-cls", "somebody.elses.Worker"),
    "cudagraph_mode=FULL": ("--compilation-config", '{"cudagraph_mode": "FULL"}'),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_refused(configure: Configure, flag: str) -> None:
    if flag == "--worker-cls" and configure().use_v2_model_runner:
        pytest.skip("only on a CPU without Triton there is a worker in the way")
    with pytest.raises(ValueError, match="cannot be used with eviction") as caught:
        configure(*REFUSED[flag])
    assert flag in str(caught.value)


def test_breakable_graphs_are_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=1 cannot be used with eviction"):
        configure()


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ({"eviction_layers": [8]}, "layers from 1 to 7"),
        ({"eviction_layers": [2], "method": "ilp", "pruning_rate": 0.8}, "layer 1 or earlier"),
    ],
)
def test_layers_that_cannot_work_are_refused(
    configure: Configure, crop: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        configure(crop=crop)


def test_a_vllm_that_no_longer_asks_its_table_serves_no_evictions(
    deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would schedule evicted tokens as if they stayed."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    monkeypatch.delitem(MODELS_CONFIG_MAP, "CropLlavaForConditionalGeneration")
    with pytest.raises(UnsupportedVersionError, match="has not prepared the engine for eviction"):
        Engine(deep_checkpoint, EVICT)


@pytest.mark.parametrize("crop", [EVICT, {"localizer": {"kind": "attention"}}], ids=["evicting", "heat"])
def test_a_vllm_whose_model_runner_is_not_ours_serves_nothing_that_needs_it(
    crop: dict[str, Any], deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock steps of an engine that allocates for kept tokens: wrong answers, and nobody would know."""
    import vllm.v1.worker.gpu.model_states as model_states

    from vllm_crop.compat import engine_hook
    from vllm_crop.models.base import CropModelMixin

    monkeypatch.setattr(engine_hook, "CPU_WORKER", "vllm.v1.worker.cpu_worker.CPUWorker")
    stock = model_states.resolve_model_state_cls

    def no_longer_asked(vllm_config: Any, model: Any) -> Any:
        if isinstance(model, CropModelMixin):
            vars(model).pop("get_model_state_cls", None)
        return stock(vllm_config, model)

    monkeypatch.setattr(model_states, "resolve_model_state_cls", no_longer_asked)
    with pytest.raises(UnsupportedVersionError, match="model runner knows nothing of evictions"):
        Engine(deep_checkpoint, crop)
