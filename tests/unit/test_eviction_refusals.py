# SPDX-License-Identifier: Apache-2.0
"""What eviction cannot work with is refused by the name of its flag; the rest of the engine is prepared."""

import sys
from collections.abc import Callable
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_crop.compat.engine_hook import CPU_WORKER, SCHEDULER, config_hook, prepare_engine
from vllm_crop.compat.points import CPU_RUNNER_POINTS
from vllm_crop.errors import UnsupportedFlagError, UnsupportedVersionError
from vllm_crop.eviction.markers import EvictionSettings
from vllm_crop.eviction.refusals import (
    REFUSED,
    REFUSED_GRAPHS,
    captures_mixed_steps,
    refuse_flags,
    refuse_graphs,
    refused_with_eviction,
    require_scheduler,
)

BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"
STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


class CUDAGraphMode(Enum):
    """vLLM's (vllm/config/compilation.py), as far as it is looked at."""

    NONE = "NONE"
    PIECEWISE = "PIECEWISE"
    FULL = "FULL"
    FULL_DECODE_ONLY = "NONE in mixed steps"
    FULL_AND_PIECEWISE = "PIECEWISE in mixed steps"

    def mixed_mode(self) -> "CUDAGraphMode":
        """What steps with prefill run with."""
        return CUDAGraphMode[self.value.split()[0]]


def engine_config() -> Any:
    """A VllmConfig with nothing on that is refused."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            tensor_parallel_size=2,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_batch_sharded_sampling=False,
            enable_expert_parallel=False,
            enable_eplb=False,
            use_ubatching=False,
            worker_cls="auto",
        ),
        offload_config=SimpleNamespace(
            offload_backend="auto", prefetch=SimpleNamespace(offload_group_size=0)
        ),
        model_config=SimpleNamespace(
            is_moe=False,
            is_hybrid=False,
            enable_prompt_embeds=False,
            skip_tokenizer_init=False,
            runner_type="generate",
            hf_config=SimpleNamespace(crop={}, crop_eviction={"stages": [2], "marker_ids": [9]}),
        ),
        cache_config=SimpleNamespace(
            kv_offloading_size=None,
            kv_sharing_fast_prefill=False,
            cache_dtype="auto",
            enable_prefix_caching=True,
        ),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=None, scheduler_cls=None, async_scheduling=None
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        use_v2_model_runner=True,
    )


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Sets `section.option` of a config."""
    *sections, name = path.split(".")

    def change(config: Any) -> None:
        for section in sections:
            config = getattr(config, section)
        setattr(config, name, value)

    return change


def mixture_of_experts_in_parallel(config: Any) -> None:
    config.parallel_config.data_parallel_size = 2
    config.model_config.is_moe = True


def prefix_caching_of_states(config: Any) -> None:
    config.model_config.is_hybrid = True


def packed_states(config: Any) -> None:
    """With VLLM_KV_CACHE_LAYOUT in the environment, by the test."""
    config.model_config.is_hybrid = True
    config.cache_config.enable_prefix_caching = False


def breakable(config: Any) -> None:
    """Set in the environment, by the test."""


SWITCHES: dict[str, Callable[[Any], None]] = {
    "--pipeline-parallel-size": put("parallel_config.pipeline_parallel_size", 2),
    "--decode-context-parallel-size": put("parallel_config.decode_context_parallel_size", 2),
    "--prefill-context-parallel-size": put("parallel_config.prefill_context_parallel_size", 2),
    "--enable-expert-parallel": put("parallel_config.enable_expert_parallel", True),
    "--enable-eplb": put("parallel_config.enable_eplb", True),
    "--data-parallel-size with a mixture of experts": mixture_of_experts_in_parallel,
    "--enable-dbo or --ubatch-size": put("parallel_config.use_ubatching", True),
    "--enable-lora": put("lora_config", SimpleNamespace()),
    "--speculative-config": put("speculative_config", SimpleNamespace()),
    "--kv-transfer-config": put("kv_transfer_config", SimpleNamespace()),
    "--kv-offloading-size": put("cache_config.kv_offloading_size", 4.0),
    "--kv-events-config": put("kv_events_config", SimpleNamespace(enable_kv_cache_events=True)),
    "--disable-hybrid-kv-cache-manager": put("scheduler_config.disable_hybrid_kv_cache_manager", True),
    "--kv-sharing-fast-prefill": put("cache_config.kv_sharing_fast_prefill", True),
    "--offload-group-size": put("offload_config.prefetch.offload_group_size", 2),
    "prefix caching of a model with linear attention (leave it off by --no-enable-prefix-caching)": (
        prefix_caching_of_states
    ),
    "VLLM_KV_CACHE_LAYOUT with blocks outermost, of a model with linear attention": packed_states,
    "--enable-prompt-embeds": put("model_config.enable_prompt_embeds", True),
    "--skip-tokenizer-init": put("model_config.skip_tokenizer_init", True),
    "--runner pooling": put("model_config.runner_type", "pooling"),
    "--scheduler-cls": put("scheduler_config.scheduler_cls", "mine.Scheduler"),
    "--compilation-config cudagraph_mode=FULL": put("compilation_config.cudagraph_mode", CUDAGraphMode.FULL),
    "VLLM_USE_BREAKABLE_CUDAGRAPH=1": breakable,
}

# What is switched on in the environment.
ENVIRONMENT = {
    "VLLM_KV_CACHE_LAYOUT with blocks outermost, of a model with linear attention": {
        "VLLM_KV_CACHE_LAYOUT": "BLNHC"
    },
    "VLLM_USE_BREAKABLE_CUDAGRAPH=1": {BREAKABLE: "1"},
}


@pytest.fixture(autouse=True)
def _no_breakable_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BREAKABLE, raising=False)


def test_every_refusal_has_its_switch_here() -> None:
    assert [flag for flag, _, _ in (*REFUSED, *REFUSED_GRAPHS)] == list(SWITCHES)
    assert list(refused_with_eviction()) == list(SWITCHES)


@pytest.mark.parametrize("flag", SWITCHES)
def test_each_flag_is_refused_by_name_and_reason(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    refuse_flags(config)
    SWITCHES[flag](config)
    for name, value in ENVIRONMENT.get(flag, {}).items():
        monkeypatch.setenv(name, value)

    reason = refused_with_eviction()[flag]
    assert [name for name, _, is_on in (*REFUSED, *REFUSED_GRAPHS) if is_on(config)] == [flag]
    with pytest.raises(UnsupportedFlagError) as refused:
        refuse_flags(config)
    assert str(refused.value).startswith(f"{flag} cannot be used with eviction")
    assert str(refused.value).endswith(reason)
    with pytest.raises(UnsupportedFlagError):
        prepare_engine(config)
    assert config.scheduler_config.scheduler_cls in (None, "mine.Scheduler"), "prepared though refused"
    assert config.parallel_config.worker_cls == "auto"


@pytest.mark.parametrize("flag", SWITCHES)
def test_a_worker_asks_again_about_graphs_only(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    SWITCHES[flag](config)
    # What `prepare_engine` has set by then.
    config.scheduler_config.scheduler_cls = SCHEDULER
    for name, value in ENVIRONMENT.get(flag, {}).items():
        monkeypatch.setenv(name, value)

    if flag in [name for name, _, _ in REFUSED_GRAPHS]:
        with pytest.raises(UnsupportedFlagError, match=flag.split("=")[0]):
            refuse_graphs(config)
    else:
        refuse_graphs(config)


@pytest.mark.parametrize("refuse", [refuse_flags, prepare_engine])
def test_a_setting_that_is_gone_is_named(refuse: Any) -> None:
    config = engine_config()
    del config.parallel_config.enable_eplb
    with pytest.raises(UnsupportedVersionError, match="no setting enable_eplb any more"):
        refuse(config)


@pytest.mark.parametrize("scheduler", [None, "mine.Scheduler"])
def test_a_model_is_not_made_for_an_engine_that_was_not_prepared(scheduler: str | None) -> None:
    config = engine_config()
    config.scheduler_config.scheduler_cls = scheduler
    with pytest.raises(UnsupportedVersionError, match="has not prepared the engine for eviction"):
        require_scheduler(config)
    config.scheduler_config.scheduler_cls = SCHEDULER
    require_scheduler(config)


HARMLESS = {
    "tensor parallel": put("parallel_config.tensor_parallel_size", 8),
    "dense replicas": put("parallel_config.data_parallel_size", 8),
    "one mixture of experts": put("model_config.is_moe", True),
    "events not enabled": put("kv_events_config", SimpleNamespace(enable_kv_cache_events=False)),
    "hybrid manager asked for": put("scheduler_config.disable_hybrid_kv_cache_manager", False),
    "offloading nothing": put("cache_config.kv_offloading_size", 0.0),
    "async": put("scheduler_config.async_scheduling", True),
    "drafting model runner": put("model_config.runner_type", "draft"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=list(HARMLESS))
def test_what_is_not_in_the_way_passes(change: Callable[[Any], None]) -> None:
    config = engine_config()
    change(config)
    refuse_flags(config)


@pytest.mark.parametrize(("value", "refused"), [("", False), ("0", False), ("1", True)])
def test_breakable_graphs(value: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BREAKABLE, value)
    if refused:
        with pytest.raises(UnsupportedFlagError, match=BREAKABLE):
            refuse_flags(engine_config())
    else:
        refuse_flags(engine_config())


@pytest.mark.parametrize("mode", [None, *CUDAGraphMode])
def test_only_graphs_of_mixed_steps_are_in_the_way(mode: CUDAGraphMode | None) -> None:
    config = engine_config()
    config.compilation_config.cudagraph_mode = mode
    assert captures_mixed_steps(config) == (mode is CUDAGraphMode.FULL)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's platform; `is_cpu` may be replaced."""
    current = SimpleNamespace(is_cpu=lambda: True)
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = current  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return current


@pytest.mark.parametrize("is_cpu", [True, False])
def test_the_v2_runner_needs_only_our_scheduler(platform: SimpleNamespace, is_cpu: bool) -> None:
    platform.is_cpu = lambda: is_cpu
    config = engine_config()
    config.parallel_config.worker_cls = "my.Worker"

    prepare_engine(config)

    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.parallel_config.worker_cls == "my.Worker"


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("worker_cls", ["auto", STOCK_WORKER])
def test_v1_on_a_cpu_needs_our_worker_too(worker_cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    monkeypatch.setattr("vllm_crop.compat.engine_hook.require_supported", checked.append)
    config = engine_config()
    config.use_v2_model_runner = False
    config.parallel_config.worker_cls = worker_cls

    prepare_engine(config)

    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.parallel_config.worker_cls == CPU_WORKER
    assert checked == [CPU_RUNNER_POINTS]


@pytest.mark.usefixtures("platform")
def test_v1_on_a_cpu_refuses_another_worker() -> None:
    config = engine_config()
    config.use_v2_model_runner = False
    config.parallel_config.worker_cls = "my.Worker"
    with pytest.raises(UnsupportedFlagError, match=r"--worker-cls my\.Worker"):
        prepare_engine(config)


def test_v1_elsewhere_is_refused_by_the_name_of_its_variable(platform: SimpleNamespace) -> None:
    platform.is_cpu = lambda: False
    config = engine_config()
    config.use_v2_model_runner = False
    with pytest.raises(UnsupportedFlagError, match="VLLM_USE_V2_MODEL_RUNNER"):
        prepare_engine(config)
    assert config.parallel_config.worker_cls == "auto"


class Every:
    """What vLLM's class of all entries does: nothing."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        return

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        return

    @staticmethod
    def asked_for_by_a_later_vllm() -> str:
        return "answered"


class Stock(Every):
    """The config hook of the architecture ours stands for."""

    seen: list[Any]

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        cls.seen.append(vllm_config)

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        cls.seen.append(model_config)


@pytest.mark.parametrize("stock", [Every, Stock])
@pytest.mark.parametrize("stages", [(), (2,)])
def test_the_hook_prepares_only_servers_that_evict(stock: Any, stages: tuple[int, ...]) -> None:
    Stock.seen = []
    config = engine_config()
    EvictionSettings(stages, tuple(range(len(stages)))).attach(config.model_config.hf_config)
    hook = config_hook(stock)

    hook.verify_and_update_config(config)
    hook.verify_and_update_model_config(config.model_config)

    assert config.scheduler_config.scheduler_cls == (SCHEDULER if stages else None)
    assert Stock.seen == ([config, config.model_config] if stock is Stock else [])
    assert hook.asked_for_by_a_later_vllm() == "answered"


def test_a_server_that_never_evicts_may_have_everything_on() -> None:
    config = engine_config()
    EvictionSettings((), ()).attach(config.model_config.hf_config)
    for switch_on in SWITCHES.values():
        switch_on(config)
    config_hook(Every).verify_and_update_config(config)
