# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to the API process, counted in instructions: the same on a busy machine.

Two `vllm serve`, stock and with the plugin, whose API process runs in valgrind's callgrind: all its threads
are counted, the engine's processes are not. Each request about a new picture is counted by itself, from
before it is sent until nothing is left to do for it. Two requests differ by a few percent all the same: the
event loop wakes up as often as tokens and timers come.
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_crop.benchmarking.api_cpu import (
    CROP,
    MODES,
    OUTPUT_TOKENS,
    SERVED,
    ask,
    elsewhere,
    make_checkpoint,
    new_picture,
)
from vllm_crop.errors import CropError
from vllm_crop.measuring.server import Server, serve

SIZES = {(336, 336): 24, (1280, 720): 16, (3840, 2160): 5}  # pictures, and of how many requests in each mode
WARM_UPS = 4
SETTLED_S = 0.5  # after the last token: a process is some twenty times slower in here
# Nothing is counted while a server starts, which takes minutes then.
COUNTING = ("valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet")
# The engine is a program of its own, so that it does not run in there; it waits for the API process.
ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENGINE_READY_TIMEOUT_S": "3600"}
READY_TIMEOUT_S = 3600.0
_TOTALS = re.compile(r"^totals: (\d+)", re.MULTILINE)


class CountingError(CropError):
    """Instructions cannot be counted here; the message says what is missing."""


@dataclass(frozen=True)
class ApiInstructions:
    """Instructions of the API process for each request about pictures of one size, ascending, by mode."""

    size: tuple[int, int]
    stock: tuple[int, ...]
    by_mode: Mapping[str, tuple[int, ...]]


def measure_api_instructions(
    sizes: Mapping[tuple[int, int], int] = SIZES, modes: Mapping[str, Mapping[str, object]] = MODES
) -> Iterator[ApiInstructions]:
    """Ask about a new picture each time, both servers in turn.

    Raises:
        CountingError: no callgrind, or it does not answer.
        ServerError: a server did not start.
    """
    if shutil.which("callgrind_control") is None:
        raise CountingError("counting instructions needs valgrind: apt-get install valgrind")
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        model = str(make_checkpoint(folder / "model"))
        plugin = ("--plugin", "crop", "--crop-config", json.dumps(CROP))
        stock = servers.enter_context(_counted(folder / "stock", {"VLLM_PLUGINS": ""}, model))
        ours = servers.enter_context(_counted(folder / "crop", {}, model, *plugin))
        seeds, random = count(), Random(0)
        for size, num_requests in sizes.items():
            of_stock: list[int] = []
            by_mode: dict[str, list[int]] = {mode: [] for mode in modes}
            for run in range(-WARM_UPS, num_requests):
                for mode, crop in modes.items():
                    theirs = stock.request(new_picture(size, next(seeds)), None)
                    more = ours.request(new_picture(size, next(seeds)), elsewhere(crop, random))
                    if run >= 0:
                        of_stock.append(theirs)
                        by_mode[mode].append(more)
            ascending = {mode: tuple(sorted(counts)) for mode, counts in by_mode.items()}
            yield ApiInstructions(size, tuple(sorted(of_stock)), ascending)


def api_instructions_table(one: ApiInstructions) -> Table:
    """A row per mode."""
    of_mode = len(one.stock) // len(one.by_mode)
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1),
        caption=f"{len(one.stock)} requests to stock vLLM, {of_mode} in each mode.",
    )
    for title in ("picture", "request"):
        table.add_column(title, no_wrap=True)
    for title in ("million\ninstructions", "quartiles", "added"):
        table.add_column(title, justify="right", no_wrap=True)
    for mode, counts in {"stock": one.stock, **one.by_mode}.items():
        low, high = counts[len(counts) // 4], counts[-1 - len(counts) // 4]
        added = "" if counts is one.stock else f"{median(counts) / median(one.stock) - 1:+.1%}"
        table.add_row(
            "{}x{}".format(*one.size) if counts is one.stock else "",
            mode,
            f"{median(counts) / 1e6:.1f}",
            f"{low / 1e6:.1f} to {high / 1e6:.1f}",
            added,
        )
    return table


class _Counted:
    """A server whose API process counts its instructions."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._control("--instr=on")

    def request(self, url: str, crop: Mapping[str, object] | None) -> int:
        """Instructions for one answer about a picture."""
        self._control("--zero")
        ask(self._server, url, crop, OUTPUT_TOKENS)
        time.sleep(SETTLED_S)
        self._control("--dump")
        counts = [int(_TOTALS.findall(dump.read_text())[-1]) for dump in self._dumps()]
        for dump in self._dumps():
            dump.unlink()
        if len(counts) != 1:
            raise CountingError(f"callgrind wrote {len(counts)} counts in {self._folder}, not one")
        return counts[0]

    def _dumps(self) -> list[Path]:
        return sorted(self._folder.glob("count.*"))

    def _control(self, what: str) -> None:
        done = subprocess.run(
            ["callgrind_control", what, str(self._server.process_id)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "OK" not in done.stdout:
            raise CountingError(f"callgrind_control {what} failed: {done.stdout}{done.stderr}")


@contextmanager
def _counted(folder: Path, env: Mapping[str, str], model: str, *args: str) -> Iterator[_Counted]:
    """A server of the benchmark whose API process runs in callgrind."""
    folder.mkdir()
    launcher = (*COUNTING, f"--callgrind-out-file={folder}/count")
    with serve(
        model,
        *SERVED,
        *args,
        log_path=folder / "server.log",
        env={**ENVIRONMENT, **env},
        launcher=launcher,
        ready_timeout_s=READY_TIMEOUT_S,
    ) as server:
        yield _Counted(server, folder)
