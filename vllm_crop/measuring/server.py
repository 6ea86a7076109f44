# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in a process group of its own, as a context manager."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from vllm_crop.errors import CropError

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.5
LOG_TAIL_LINES = 12
# "ValueError: ..." at the start of a line or behind vLLM's own "(Worker pid=1) ERROR ... [file.py:1] ".
_EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)


class ServerError(CropError):
    """A server did not start, or ended while it was needed; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        model: the name requests use, the first argument of `vllm serve`.
        base_url: `http://127.0.0.1:PORT`, without a path.
        process_id: the API server, leader of the process group.
        command: the command line it was started with.
        log_path: everything it prints.
        start_s: seconds from start to a healthy answer.
    """

    model: str
    base_url: str
    process_id: int
    command: tuple[str, ...]
    log_path: Path
    start_s: float


@contextmanager
def serve(
    model: str,
    *args: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    ready_timeout_s: float = 600.0,
    console: Console | None = None,
    port: int | None = None,
    launcher: Sequence[str] = (),
) -> Iterator[Server]:
    """Run `vllm serve model *args` on a free port of the loopback interface until the block ends.

    Args:
        model: checkpoint folder or name.
        args: further options of `vllm serve`.
        log_path: file for its output, overwritten; missing folders are made.
        env: variables set on top of this process's.
        ready_timeout_s: how long it may take until `/health` answers.
        console: where the progress line goes; standard error by default.
        port: another than any free one.
        launcher: a program, and its options, that runs the server's as its last arguments.

    Raises:
        ServerError: the server ended or did not get healthy in time.
    """
    port = port or free_port()
    command = ("serve", model, "--host", HOST, "--port", str(port), *args)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log, _stopped_by_sigterm():
        process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "vllm.entrypoints.cli.main", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,
        )
        try:
            base_url = f"http://{HOST}:{port}"
            console = console or Console(stderr=True)
            start_s = _wait_until_healthy(process, base_url, log_path, ready_timeout_s, console)
            yield Server(model, base_url, process.pid, ("vllm", *command), log_path, start_s)
        finally:
            stop_group(process)


def wait_until_ready(
    process: "subprocess.Popen[bytes]", name: str, url: str, log_path: Path, timeout_s: float = 60.0
) -> None:
    """Wait until a program other than `vllm serve` answers at an address.

    Raises:
        ServerError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            get_text(url)
            return
        time.sleep(POLL_INTERVAL_S)
    raise ServerError(f"{name} is not ready. The end of {log_path}:\n{log_tail(log_path)}")


def log_tail(log_path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a server's log, below the first exceptions in it, indented for an error message.

    vLLM ends with the exception of the outermost process; the cause is a hundred lines further up.
    """
    text = log_path.read_text(errors="replace") if log_path.exists() else ""
    tail = text.splitlines()[-lines:]
    causes = [cause for cause in dict.fromkeys(_EXCEPTION.findall(text)) if cause not in tail][:3]
    shown = [*causes, "...", *tail] if causes else tail
    return "\n".join(f"    {line}" for line in shown) or "    (the log is empty)"


def get_text(url: str, timeout_s: float = 5.0) -> str:
    """GET from a server on this machine, past any configured proxy.

    Raises:
        OSError: no connection, no answer in time or an HTTP error.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout_s) as response:
        return str(response.read().decode())


def _wait_until_healthy(
    process: "subprocess.Popen[bytes]", base_url: str, log_path: Path, timeout_s: float, console: Console
) -> float:
    start = time.monotonic()
    with console.status("") as status:
        while (elapsed := time.monotonic() - start) < timeout_s:
            status.update(f"starting vllm serve: {elapsed:.0f} s (log: {log_path})")
            if process.poll() is not None:
                raise ServerError(
                    f"vllm serve ended with exit code {process.returncode} after {elapsed:.0f} s. "
                    f"The end of {log_path}:\n{log_tail(log_path)}"
                )
            with suppress(OSError):
                get_text(f"{base_url}/health")
                return elapsed
            time.sleep(POLL_INTERVAL_S)
    raise ServerError(
        f"vllm serve was not ready after {timeout_s:.0f} s. The end of {log_path}:\n{log_tail(log_path)}"
    )


def stop_group(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the leader, which stops its engine; then SIGKILL to whatever is left of the group.

    SIGINT would not be heard where a shell has started all of this in the background.
    """
    try:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # a second Ctrl-C arrives here at once
        deadline = time.monotonic() + KILL_TIMEOUT_S
        with suppress(ProcessLookupError):  # the group is gone, and its port and memory are free
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        process.wait()


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, which it would not do by itself: the server would be left behind."""
    try:
        previous = signal.signal(signal.SIGTERM, _exit)
    except ValueError:  # handlers belong to the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
