# SPDX-License-Identifier: Apache-2.0
"""A Ray of one machine that leaves nothing behind, and what Ray Serve says of its application."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_crop.errors import CropError
from vllm_crop.measuring.server import free_port, get_text, log_tail

START_S, STOP_S = 120.0, 60.0
APPLICATION_START_S = 600.0
_COMMANDS = Path(sys.executable).parent
# Ray counts processors that tasks reserve; with the machine's own number two replicas would not be placed.
_LOGICAL_PROCESSORS = 12


class RayError(CropError):
    """Ray, or an application in it, did not start."""


@dataclass(frozen=True)
class Cluster:
    """A running Ray; `dashboard` is its address for `serve deploy`."""

    dashboard: str

    def deploy(self, config: Path) -> float:
        """Hand over an application as users do; seconds until all replicas answer."""
        begin = time.monotonic()
        command = [str(_COMMANDS / "serve"), "deploy", "-a", self.dashboard, str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RayError(f"serve deploy failed: {done.stderr[-2000:]}")
        while (elapsed := time.monotonic() - begin) < APPLICATION_START_S:
            application = self._application()
            if application.get("status") == "RUNNING":
                return elapsed
            if application.get("status") == "DEPLOY_FAILED":
                raise RayError(f"the application did not start: {application.get('message')}")
            time.sleep(0.5)
        raise RayError(f"the application was not ready after {elapsed:.0f} s")

    def replicas(self) -> set[int]:
        """Process ids of the replicas that answer."""
        return {
            replica["pid"]
            for name, deployment in self._application().get("deployments", {}).items()
            if name.startswith("LLMServer")
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }

    def _application(self) -> dict[str, Any]:
        answer = json.loads(get_text(f"{self.dashboard}/api/serve/applications/", timeout_s=30))
        return next(iter(answer["applications"].values()), {})


@contextmanager
def run_ray(environment: Mapping[str, str], log_path: Path) -> Iterator[Cluster]:
    """Run Ray until the block ends; the logs of its replicas are left in a folder beside `log_path`.

    Raises:
        RayError: it ended, or was not ready in time.
    """
    dashboard_port = free_port()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # Sockets lie in this folder, whose path must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    command = [
        *(str(_COMMANDS / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--temp-dir", str(folder), "--num-cpus", str(_LOGICAL_PROCESSORS)),
        *("--port", str(free_port()), "--ray-client-server-port", str(free_port())),
        *("--dashboard-port", str(dashboard_port), "--dashboard-agent-listen-port", str(free_port())),
    ]
    ports = {"RAY_SERVE_HAPROXY_STATS_PORT": free_port(), "RAY_SERVE_HAPROXY_METRICS_PORT": free_port()}
    # Nothing is to be moved to another node before this one ends.
    variables = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"} | {key: str(ports[key]) for key in ports}
    with log_path.open("wb") as log:
        ray = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables, **environment},
            start_new_session=True,
        )
    try:
        _wait_until_ready(ray, f"http://127.0.0.1:{dashboard_port}", log_path)
        yield Cluster(f"http://127.0.0.1:{dashboard_port}")
    finally:
        ray.terminate()  # it ends all that it has started
        with suppress(subprocess.TimeoutExpired):
            ray.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(ray.pid, signal.SIGKILL)
        kept = log_path.with_suffix("")
        shutil.rmtree(kept, ignore_errors=True)
        for logs in folder.glob("session_2*/logs/serve"):
            shutil.copytree(logs, kept)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(ray: "subprocess.Popen[bytes]", dashboard: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_S
    while ray.poll() is None and time.monotonic() < deadline:
        try:
            get_text(f"{dashboard}/api/serve/applications/", timeout_s=30)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise RayError(f"Ray is not ready. The end of {log_path}:\n{log_tail(log_path)}")
