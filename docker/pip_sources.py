# SPDX-License-Identifier: Apache-2.0
"""Where this machine's pip gets packages from, for a build: its indexes, files and certificates.

A build behind a mirror, or one that needs PyTorch's own index, is told by a secret, which no layer keeps.
"""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Other settings are this machine's own: where to install, what to refuse, how to look.
SOURCES = (
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "trusted-host",
    "cert",
    "proxy",
    "timeout",
)


def of_this_machine() -> dict[str, str]:
    """pip's settings of SOURCES, from its files and from the environment, which comes first."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return read(finished.stdout) if finished.returncode == 0 else {}


def read(listed: str) -> dict[str, str]:
    """The settings in what `pip config list` prints, lines like `global.index-url='...'`."""
    settings: dict[str, str] = {}
    for section in ("global", "install", "wheel", ":env:"):  # the later ones come first for pip
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            of, _, key = name.rpartition(".")
            key = {"default-timeout": "timeout"}.get(key, key)
            if of == section and key in SOURCES:
                settings[key] = " ".join(str(ast.literal_eval(value)).split())
    return settings


def as_file(settings: Mapping[str, str]) -> str:
    """The text of a pip.conf."""
    return "\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items()), ""])


def on_disk(settings: Mapping[str, str]) -> list[Path]:
    """What settings name on this machine's disk. An index's files lie beside it, as in mirrors of files."""
    found = []
    for key in ("index-url", "extra-index-url", "find-links", "cert"):
        for word in settings.get(key, "").split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                found.append(path.parent if key.endswith("index-url") else path)
    return list(dict.fromkeys(found))
