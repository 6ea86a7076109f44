# SPDX-License-Identifier: Apache-2.0
"""docker/cpu/install.sh leaves environments alone that are not this checkout's; nothing is installed here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CANNOT_INSTALL = "#!/bin/sh\ncase $* in *pip*) echo INSTALLS; exit 1;; esac\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name in ("pyproject.toml", "constraints.txt"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "docker" / "cpu", folder / "docker" / "cpu", ignore=lambda *_: ["__pycache__"])
    return folder


def environment(folder: Path, owner: Path | None) -> Path:
    """An environment whose Python starts and cannot install, set up for a checkout."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    (folder / "bin" / "python").write_text(CANNOT_INSTALL)
    (folder / "bin" / "python").chmod(0o755)
    if owner is not None:
        (folder / ".vllm-crop-setup").write_text(f"abc123-dev-{owner}\n")
    return folder


def set_up(checkout: Path) -> str:
    """What it says; it ends with an error in any case."""
    command = [checkout / "docker" / "cpu" / "install.sh", ".venv"]
    asked = subprocess.run(
        command, cwd=checkout, env=os.environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert asked.returncode == 1
    return asked.stdout + asked.stderr


@pytest.mark.parametrize("linked", [True, False])
def test_an_environment_of_another_checkout_is_left_alone(
    checkout: Path, tmp_path: Path, linked: bool
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    if linked:
        (checkout / ".venv").symlink_to(environment(other / ".venv", other))
    else:
        environment(checkout / ".venv", other)
    said = set_up(checkout)
    assert f".venv is the environment of {other}, " in said
    assert "make VENV=" in said
    assert "INSTALLS" not in said


def test_a_link_to_somebodys_environment_is_not_followed(checkout: Path, tmp_path: Path) -> None:
    theirs = environment(tmp_path / "theirs", None)
    (checkout / ".venv").symlink_to(theirs)
    said = set_up(checkout)
    assert f"no set-up of ours has made: {theirs}" in said
    assert "INSTALLS" not in said


@pytest.mark.parametrize("owner", ["same", "by another path", "gone", "nobody"])
def test_this_checkouts_own_is_repaired(checkout: Path, tmp_path: Path, owner: str) -> None:
    """Also on another disk, and where the checkout was moved."""
    (tmp_path / "link").symlink_to(checkout)
    owners = {"same": checkout, "by another path": tmp_path / "link", "gone": tmp_path / "gone"}
    where = tmp_path / "disk" if owner == "same" else checkout / ".venv"
    environment(where, owners.get(owner))
    if owner == "same":
        (checkout / ".venv").symlink_to(where)
    assert "INSTALLS" in set_up(checkout)
