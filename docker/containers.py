# SPDX-License-Identifier: Apache-2.0
"""Containers of an image that can be started, crashed, started again and stopped, with any of the tools."""

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
from image_tools import Tool, output

PORT = 8000  # of the server inside, unless it is told another
STOP_S = 60


class Container(Protocol):
    """A container, which keeps its file system from one start to the next."""

    def start(self) -> None:
        """Run the image's entrypoint with its own arguments."""

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run another command in it."""

    def is_running(self) -> bool:
        """Whether the entrypoint has not ended."""

    def kill(self) -> None:
        """End all of it as a crash does."""

    def stop(self) -> int:
        """End it with SIGTERM; its exit code."""

    def log(self) -> str:
        """All that it has printed."""

    def remove(self) -> None:
        """Forget it, running or not."""


def make_container(tool: Tool, tag: str, port: int, log_path: Path) -> Container:
    """A container that is not running yet, whose server will answer on `port` of the loopback interface."""
    if tool.name != "buildah":
        return DockerContainer(tool.name, tag, port)
    settings = tool.settings(tag)
    command = [*settings["Entrypoint"], *settings["Cmd"], "--port", str(port)]
    return BuildahContainer(tag, command, port, log_path)


def run_once(tool: Tool, tag: str, user: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a container that nothing has run in before."""
    if tool.name != "buildah":
        whole = [tool.name, "run", "--rm", "--user", user, "--entrypoint", command[0], tag, *command[1:]]
        return subprocess.run(whole, capture_output=True, text=True, check=False)
    container = BuildahContainer(tag, (), PORT, Path(os.devnull))
    try:
        return container.run(*command, user=user)
    finally:
        container.remove()


class DockerContainer:
    """Of docker or podman."""

    def __init__(self, program: str, tag: str, port: int) -> None:
        self.program = program
        self.id = output(program, "create", "-p", f"127.0.0.1:{port}:{PORT}", tag)

    def start(self) -> None:
        output(self.program, "start", self.id)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        whole = [self.program, "exec", self.id, *command]
        return subprocess.run(whole, capture_output=True, text=True, check=False)

    def is_running(self) -> bool:
        return self._inspect("{{.State.Running}}") == "true"

    def kill(self) -> None:
        output(self.program, "kill", "--signal", "KILL", self.id)

    def stop(self) -> int:
        output(self.program, "stop", "-t", str(STOP_S), self.id)
        return int(self._inspect("{{.State.ExitCode}}"))

    def log(self) -> str:
        command = [self.program, "logs", self.id]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout

    def remove(self) -> None:
        output(self.program, "rm", "--force", self.id)

    def _inspect(self, template: str) -> str:
        return output(self.program, "inspect", "--format", template, self.id)


class BuildahContainer:
    """Of buildah, which has this machine's network and keeps nothing running but what it is waiting for."""

    def __init__(self, tag: str, command: Sequence[str], port: int, log_path: Path) -> None:
        self.command, self.port, self.log_path = command, port, log_path
        self.id = output("buildah", "from", "--pull-never", tag)
        self.process: subprocess.Popen[bytes] | None = None
        log_path.write_text("")

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                ["buildah", "run", self.id, "--", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def run(self, *command: str, user: str | None = None) -> "subprocess.CompletedProcess[str]":
        as_user = ["--user", user] if user else []
        words = [word.replace(f":{PORT}", f":{self.port}") for word in command]
        whole = ["buildah", "run", *as_user, self.id, "--", *words]
        return subprocess.run(whole, capture_output=True, text=True, check=False)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        self._end(self._processes())

    def stop(self) -> int:
        processes = self._processes()
        for process in processes[:1]:  # a signal to buildah itself would leave these behind
            process.terminate()
        code = 0 if self.process is None else self.process.wait(STOP_S)
        self._end(processes)
        return code

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def remove(self) -> None:
        self.kill()
        output("buildah", "rm", self.id)

    def _end(self, processes: "list[psutil.Process]") -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.wait(STOP_S)

    def _processes(self) -> "list[psutil.Process]":
        """Those in the container, the entrypoint's first."""
        if self.process is None or not self.is_running():
            return []
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if not process.cmdline()[0].startswith("buildah")]
