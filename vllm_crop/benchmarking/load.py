# SPDX-License-Identifier: Apache-2.0
"""vLLM's own load generator, `vllm bench serve`, in one quiet process for all runs.

Starting it costs ten seconds of imports on a small machine, so it is started once; what vLLM prints goes to
a log file.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from vllm_crop.benchmarking.runs import RunError, RunSpec
from vllm_crop.measuring.server import HOST, Server

QUESTION_TOKENS = 16

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Client:
    """A process that has vLLM loaded and calls functions, one after the other."""

    def __init__(self, log_path: Path, env: Mapping[str, str] | None = None) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_bytes(b"")
        self.log_path = log_path
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=get_context("spawn"),
            initializer=_prepare,
            initargs=(str(log_path), env or {}),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a module-level function there and return what it returns, or raise what it raises."""
        try:
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise RunError(f"the load generator ended; see {self.log_path}") from None


def bench_arguments(
    spec: RunSpec,
    server: Server,
    num_prompts: int,
    output_len: int,
    image_side: int,
    extra_body: Mapping[str, Any],
) -> list[str]:
    """The options of `vllm bench serve` for one run: closed loop, one random square image per request.

    No ready check and no warm-up of its own: both send the first request of the run beforehand, which the
    prefix cache would then answer.
    """
    options = {
        "--backend": "openai-chat",
        "--endpoint": "/v1/chat/completions",
        "--base-url": server.base_url,
        "--model": server.model,
        "--num-prompts": num_prompts,
        "--max-concurrency": spec.concurrency,
        "--seed": spec.seed,
        "--temperature": 0,
        "--dataset-name": "random-mm",
        "--random-input-len": QUESTION_TOKENS,
        "--random-output-len": output_len,
        "--random-mm-limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
        "--random-mm-bucket-config": f"{{({image_side}, {image_side}, 1): 1.0}}",
        "--percentile-metrics": "ttft,tpot",
        "--metric-percentiles": "99",
        "--ready-check-timeout-sec": 0,
        "--num-warmups": 0,
        "--extra-body": json.dumps(extra_body),
    }
    flat = [str(part) for option in options.items() for part in option]
    return [*flat, "--save-detailed", "--disable-tqdm"]


def run_bench(arguments: list[str]) -> dict[str, Any]:
    """`vllm bench serve` with these options; returns what it would save. Called in the client's process."""
    import asyncio

    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit:
        raise RunError(f"this vLLM's `bench serve` refuses one of {arguments}") from None
    result: dict[str, Any] = asyncio.run(serve.main_async(parsed))
    return result


def _prepare(log_path: str, env: Mapping[str, str]) -> None:
    os.environ.update(env)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # aiohttp would send even local requests through a configured proxy.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
