# SPDX-License-Identifier: Apache-2.0
"""Servers started with `vllm serve`, asked through the real clients."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import STARTS, CheckpointOf
from tests.families import (
    GLM4V,
    INTERNVL,
    INTERNVL_CHAT,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN3_VL,
    Family,
)
from tests.foveated_reference import foveating
from tests.reference import HfReference
from vllm_crop.config import CropConfig
from vllm_crop.measuring import server as measuring
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.server import Server, get_text
from vllm_crop.planning.plan import Compression

API_KEY = "sekret-0123"
MODEL = "tiny-llava"
OPTIONS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
    *("--block-size", "32", "--limit-mm-per-prompt", '{"image": 8}', "--max-num-batched-tokens", "2048"),
)
# What an operator may well set; none of it may reach the localizer's own requests.
OPERATORS = (
    *("--trust-request-mm-kwargs", "--enable-mm-embeds"),
    *("--reasoning-parser", "qwen3", "--default-chat-template-kwargs", '{"enable_thinking": false}'),
)
REMOTE_MODEL = "localizer"  # what a server that finds regions for another one calls its model
# Its two names take the place of the one in OPTIONS.
STOCK_OPTIONS = (*OPTIONS, *OPERATORS, "--served-model-name", MODEL, REMOTE_MODEL)
FAMILIES = (
    *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL),
    *(GLM4V, INTERNVL, INTERNVL_CHAT, MISTRAL3),
)
# Served by two tensor-parallel workers: with M-RoPE, with tiles between framing text, with row breaks.
ON_TWO_WORKERS = (GLM4V, INTERNVL, MISTRAL3)
FAMILY_CROP = {"method": "plc+ilp", "eviction_layers": [2], "pruning_rate": 0.667}


# Not what this process logs. A server's only worker runs in its engine's process, as on a GPU; on the CPU
# vLLM would give it one of its own, for which all is imported once more: a third of a start. Where there are
# two workers (the server of test_eviction.py), each has its process all the same. And a client that takes up
# a connection again just when the server gives it up would see no answer.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}


def serve(*args: Any, env: Mapping[str, str] | None = None, **kwargs: Any) -> AbstractContextManager[Server]:
    """A server of this test run, counted."""
    STARTS["servers"] += 1
    return measuring.serve(*args, env={**ENVIRONMENT, **(env or {})}, **kwargs)


def one_core_each() -> dict[str, str]:
    """Variables for two tensor-parallel workers."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores)}


def metric(server: Server, name: str, **labels: str) -> float:
    """A sample on /metrics, 0 if it is not there yet."""
    return metric_sum(get_text(f"{server.base_url}/metrics"), name, **labels)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> str:
    """How many API servers share a port: two in the whole product, and always in `localizing_server`."""
    return "2" if request.config.getoption("--all-families") else "1"


@pytest.fixture(scope="module")
def server(checkpoint: Path, logs: Path, processes: str) -> Iterator[Server]:
    """An API key, pooling to 96 tokens."""
    crop = ("--plugin", "crop", "--crop-config", '{"pruning_rate": 0.8333}')
    options = ("--api-server-count", processes, "--api-key", API_KEY)
    with serve(str(checkpoint), *crop, *options, *OPTIONS, log_path=logs / "crop.log") as running:
        yield running


@pytest.fixture(scope="session")
def localizing_server(logs: Path) -> Iterator[Server]:
    """The trained model, finding regions itself, on two API server processes, with the page."""
    from tests.tinyvqa import CHECKPOINT, ENGINE, crop_options

    # A processor cache that is full soon: memory can be watched. A picture that is gone is fetched once: the
    # waits between three attempts are vLLM's.
    options = ("--api-server-count", "2", "--api-key", API_KEY, "--mm-processor-cache-gb", "0.05")
    env = {"VLLM_PLUGINS": "crop", "VLLM_MEDIA_FETCH_MAX_RETRIES": "1"}
    crop = crop_options(ENGINE, eviction_layers=[1])
    log = logs / "localizing.log"
    with serve(str(CHECKPOINT), *crop, *options, *OPTIONS, log_path=log, env=env) as running:
        yield running


@pytest.fixture(scope="session")
def checked_server(logs: Path, processes: str) -> Iterator[Server]:
    """The trained model, finding where to look by its attention.

    Every pruned request is checked. In the whole product two engines answer (data parallel).
    """
    from lab.demo.setting import LOCALIZER
    from tests.tinyvqa import CHECKPOINT, crop_options

    # A limit that the localizer's own view is above: it is none of the clients'.
    limits, shadow = {"max_pruning_rate": 0.889}, {"rate": 1.0, "max_held": 4}
    crop = crop_options(LOCALIZER, eviction_layers=[1], limits=limits, shadow=shadow)
    options = (
        *("--api-server-count", processes, "--scheduling-policy", "priority"),
        *("--data-parallel-size", processes),
    )
    page, log = {"VLLM_PLUGINS": "crop"}, logs / "checked.log"
    with serve(str(CHECKPOINT), *crop, *options, *OPTIONS, log_path=log, env=page) as running:
        yield running


def compression_of(family: Family) -> Compression:
    """How `family_server` compresses: one of them shows its vision tower parts of images."""
    return "foveate" if family is QWEN3_VL else "pool"


@pytest.fixture(scope="session")
def stock_server(logs: Path) -> Iterator[Server]:
    """The trained model, the plugin installed but not asked for: others are compared with it, and one finds
    regions there.
    """
    from tests.tinyvqa import CHECKPOINT

    with serve(str(CHECKPOINT), *STOCK_OPTIONS, log_path=logs / "stock.log") as running:
        yield running


@pytest.fixture(scope="session", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    """The family of `family_server`; tests/selection.py leaves some out."""
    found: Family = request.param
    return found


@pytest.fixture(scope="session")
def family_server(family: Family, checkpoint_of: CheckpointOf, logs: Path) -> Iterator[Server]:
    """A server that compresses and evicts, with the page and vLLM's processor cache in shared memory."""
    crop = FAMILY_CROP | {"compression": compression_of(family)}
    options = ("--crop-config", json.dumps(crop), "--mm-processor-cache-type", "shm")
    if family.options.get("trust_remote_code"):
        options = (*options, "--trust-remote-code")
    env = {"VLLM_PLUGINS": "crop"}
    if family in ON_TWO_WORKERS:
        options = (*options, "--tensor-parallel-size", "2")
        env |= one_core_each()
    checkpoint, log = checkpoint_of(family, family.deep), logs / f"{family}.log"
    with serve(str(checkpoint), *options, *OPTIONS, log_path=log, env=env) as running:
        yield running


@pytest.fixture(scope="session")
def family_hf(family: Family, checkpoint_of: CheckpointOf) -> HfReference:
    """What `family_server` must answer."""
    checkpoint = checkpoint_of(family, family.deep)
    if compression_of(family) == "foveate":
        return foveating(family.reference, checkpoint, CropConfig(compression="foveate"))
    return family.reference(checkpoint)
