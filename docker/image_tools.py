# SPDX-License-Identifier: Apache-2.0
"""Builds and describes images with docker, podman or buildah, whichever works here. Needs Python alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol


def fail(reason: str) -> NoReturn:
    """End with a sentence on the standard error."""
    sys.exit(f"\nimage: {reason}")


def output(*command: str) -> str:
    """What a command prints; a sentence and the end where it fails."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        fail(f"{' '.join(command)} failed:\n{finished.stderr.strip()}")
    return finished.stdout.strip()


class Tool(Protocol):
    """One of the three programs."""

    name: str

    def build(
        self, dockerfile: str, tag: str, pip_conf: Path, files: Sequence[Path], args: Sequence[str]
    ) -> int:
        """Build an image from the current folder; the exit code.

        Args:
            pip_conf: for the secret `pip.conf`.
            files: what it names on this machine's disk.
            args: further options of the program.
        """

    def settings(self, tag: str) -> dict[str, Any]:
        """`User`, `Entrypoint`, `Cmd`, `Healthcheck` and the like of an image."""

    def size(self, tag: str) -> str:
        """An image's size, for people."""


class Docker:
    """docker, or podman, which takes the same commands."""

    def __init__(self, name: str) -> None:
        self.name = name

    def build(
        self, dockerfile: str, tag: str, pip_conf: Path, files: Sequence[Path], args: Sequence[str]
    ) -> int:
        command = [self.name, "build", "-f", dockerfile, "-t", tag, "--secret", f"id=pip.conf,src={pip_conf}"]
        if self.name == "podman":
            command += ["--format", "docker", *volumes(files)]  # OCI's format has no HEALTHCHECK
        elif files:  # which it cannot lend to a build
            print(f"image: docker's build does not see {', '.join(map(str, files))}", file=sys.stderr)
        env = {**os.environ, "DOCKER_BUILDKIT": "1"}  # secrets need it
        return subprocess.run([*command, *args, "."], check=False, env=env).returncode

    def settings(self, tag: str) -> dict[str, Any]:
        (found,) = json.loads(output(self.name, "image", "inspect", tag))
        return dict(found["Config"])

    def size(self, tag: str) -> str:
        return f"{int(output(self.name, 'image', 'inspect', '--format', '{{.Size}}', tag)) / 1e9:.2f} GB"


class Buildah:
    """buildah, which with BUILDAH_ISOLATION=chroot also works where no container can be run."""

    name = "buildah"

    def build(
        self, dockerfile: str, tag: str, pip_conf: Path, files: Sequence[Path], args: Sequence[str]
    ) -> int:
        command = ["buildah", "bud", "--format", "docker", "-f", dockerfile, "-t", tag]
        command += ["--secret", f"id=pip.conf,src={pip_conf}", *volumes(files)]
        return subprocess.run([*command, *args, "."], check=False).returncode

    def settings(self, tag: str) -> dict[str, Any]:
        return dict(json.loads(output("buildah", "inspect", "--type", "image", tag))["Docker"]["config"])

    def size(self, tag: str) -> str:
        return str(json.loads(output("buildah", "images", "--json", tag))[0]["size"])


def volumes(files: Sequence[Path]) -> list[str]:
    """Options that lend files and folders to a build, read-only, under their own names."""
    return [word for file in files for word in ("--volume", f"{file}:{file}:ro")]


def find_tool() -> Tool:
    """The first of the three that works here, or the one that the variable IMAGE_TOOL names."""
    named = os.environ.get("IMAGE_TOOL")
    for name in (named,) if named else ("docker", "podman", "buildah"):
        # A client of docker is often there without a daemon that would listen to it.
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return Buildah() if name == "buildah" else Docker(name)
    fail(f"{named} does not work here" if named else "none of docker, podman and buildah works here")
