# SPDX-License-Identifier: Apache-2.0
"""Builds an image: docker/build_image.py cpu|gpu [OPTIONS OF THE TOOL]     (from the project's root)

The tool is docker, podman or buildah, the first that works or the one that IMAGE_TOOL names; the image is
called vllm-crop:cpu or vllm-crop:gpu, or what IMAGE names.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pip_sources
from image_tools import Tool, fail, find_tool

DOCKERFILES = {"cpu": "docker/Dockerfile.cpu", "gpu": "docker/Dockerfile"}


def tag_of(kind: str) -> str:
    """What an image is called."""
    return os.environ.get("IMAGE") or f"vllm-crop:{kind}"


def labels() -> list[str]:
    """Options that say which version and commit is inside; a base's own labels would say the base's."""
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    told = {"version": version, "revision": asked.stdout.strip() or "unknown"}
    return [f"--label=org.opencontainers.image.{name}={value}" for name, value in told.items()]


def _another_way(tool: Tool, kind: str) -> str:
    if tool.name != "buildah" or os.environ.get("BUILDAH_ISOLATION"):
        return ""
    target = {"cpu": "image", "gpu": "image-gpu"}[kind]
    return f". Where no container may be run, this can do: BUILDAH_ISOLATION=chroot make {target}"


def build(tool: Tool, kind: str, args: Sequence[str]) -> None:
    """Build the image of a kind, with pip's sources of this machine."""
    settings = pip_sources.of_this_machine()
    with tempfile.TemporaryDirectory() as folder:
        pip_conf = Path(folder) / "pip.conf"
        pip_conf.write_text(pip_sources.as_file(settings))
        files = pip_sources.on_disk(settings)
        code = tool.build(DOCKERFILES[kind], tag_of(kind), pip_conf, files, [*labels(), *args])
    if code:
        fail(f"{tool.name} could not build {DOCKERFILES[kind]}, see above{_another_way(tool, kind)}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in DOCKERFILES:
        fail(f"which one? {' or '.join(DOCKERFILES)}")
    tool = find_tool()
    build(tool, sys.argv[1], sys.argv[2:])
    print(f"\n{tag_of(sys.argv[1])}: {tool.size(tag_of(sys.argv[1]))}, built with {tool.name}")
