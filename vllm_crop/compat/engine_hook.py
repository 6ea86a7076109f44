# SPDX-License-Identifier: Apache-2.0
"""Brings eviction's scheduler and, on plain CPUs, our worker into vLLM's configuration.

vLLM calls a model's entry in MODELS_CONFIG_MAP (vllm/model_executor/models/config.py) while it completes the
engine's configuration, in the process that starts the engine.
"""

from typing import Any

from vllm_crop.compat.points import CPU_RUNNER_POINTS
from vllm_crop.compat.supported import require_supported
from vllm_crop.errors import UnsupportedFlagError
from vllm_crop.eviction.markers import EvictionSettings
from vllm_crop.eviction.refusals import SCHEDULER, refuse_flags
from vllm_crop.heat.refusals import makes_heat
from vllm_crop.heat.refusals import refuse_flags as refuse_heat_flags

CPU_WORKER = "vllm_crop.runners.v1.CropCPUWorker"


def config_hook(stock: Any) -> type[Any]:
    """The entry for one of our architectures.

    Args:
        stock: that of the architecture it stands for, or the class of all entries.
    """

    class EngineConfigHook(stock):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            stock.verify_and_update_config(vllm_config)
            prepare_engine(vllm_config)

    return EngineConfigHook


def prepare_engine(vllm_config: Any) -> None:
    """Refuse what cannot work and name our scheduler and worker, where the server needs them.

    Raises:
        UnsupportedFlagError: naming the flag or the environment variable in the way.
    """
    hf_config = vllm_config.model_config.hf_config
    evicts, heat = bool(EvictionSettings.from_hf_config(hf_config).stages), makes_heat(hf_config)
    if evicts:
        refuse_flags(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    if heat:
        refuse_heat_flags(vllm_config)
    if not (evicts or heat) or vllm_config.use_v2_model_runner:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise UnsupportedFlagError(
            "eviction and localizer kind 'attention' need vLLM's V2 model runner on this platform: unset "
            "VLLM_USE_V2_MODEL_RUNNER, install Triton, and leave out what vLLM names above as not supported "
            "by V2"
        )
    worker_cls = vllm_config.parallel_config.worker_cls
    if worker_cls not in ("auto", "vllm.v1.worker.cpu_worker.CPUWorker"):
        raise UnsupportedFlagError(
            f"--worker-cls {worker_cls} cannot be used with eviction or localizer kind 'attention' on a CPU "
            "without Triton: they bring a worker of their own there"
        )
    require_supported(CPU_RUNNER_POINTS)
    vllm_config.parallel_config.worker_cls = CPU_WORKER
