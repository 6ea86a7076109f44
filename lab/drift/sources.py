# SPDX-License-Identifier: Apache-2.0
"""Where the text of modules comes from: a wheel, a folder, our own checkout."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from packaging.version import InvalidVersion, Version

from vllm_crop.errors import CropError

OUR_PACKAGES = {"vllm_crop": ".", "vllm_crop_server": "server", "lab": ".", "tests": "."}


class SourceError(CropError):
    """There is no vLLM to read."""


class Sources:
    """Python files by module name.

    Attributes:
        title: what the report calls it.
        metadata: the text of METADATA; None where there is none.
    """

    def __init__(self, title: str, files: Iterable[tuple[PurePosixPath, str]], metadata: str | None = None):
        self.title = title
        self.metadata = metadata
        self._texts: dict[str, str] = {}
        self._files: dict[str, PurePosixPath] = {}
        for file, text in files:
            parts = file.with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self._texts[module], self._files[module] = text, file

    def __contains__(self, module: str) -> bool:
        return module in self._texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def text(self, module: str) -> str:
        """The source of a module."""
        return self._texts[module]

    def is_package(self, module: str) -> bool:
        """Whether a module is a package, which relative imports count from."""
        return self._files[module].name == "__init__.py"


def open_vllm(name: str, wheels: Path) -> Sources:
    """Read the vLLM that a version, a wheel or a folder with `vllm/` in it names; a version is downloaded.

    Raises:
        SourceError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        return _read_folder(path)
    return _read_wheel(path if path.suffix == ".whl" else _download(name, wheels))


def our_sources(root: Path) -> Sources:
    """The sources of this project, by the names they are imported under."""

    def files() -> Iterator[tuple[PurePosixPath, str]]:
        for package, folder in OUR_PACKAGES.items():
            for file in sorted((root / folder / package).rglob("*.py")):
                yield PurePosixPath(file.relative_to(root / folder)), file.read_text("utf-8")

    return Sources("vllm-crop", files())


def _download(wanted: str, wheels: Path) -> Path:
    version = _full(wanted)
    kept = sorted(wheels.glob(f"vllm-{version}-*.whl"))
    if kept:
        return kept[0]
    print(f"downloading vllm {version} into {wheels} (about 330 MB, kept)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(wheels), f"vllm=={version}"]
    failed = subprocess.run(command, check=False).returncode
    got = sorted(wheels.glob(f"vllm-{version}-*.whl"))
    if failed or not got:
        raise SourceError(f"pip found no wheel of vllm=={version}: see above")
    return got[0]


def _full(wanted: str) -> str:
    """A version as wheels write it: 0.33.0 of 0.33, 0.34.0rc1 of 0.34rc1.

    Raises:
        SourceError: it is none.
    """
    try:
        version = Version(wanted)
    except InvalidVersion:
        raise SourceError(f"{wanted} is no version, wheel or folder with vllm/ in it") from None
    release = ".".join(map(str, (*version.release, 0, 0)[: max(3, len(version.release))]))
    return f"{release}{str(version).removeprefix(version.base_version)}"


def _read_wheel(path: Path) -> Sources:
    try:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            python = [name for name in names if name.startswith("vllm/") and name.endswith(".py")]
            metadata = [name for name in names if name.endswith(".dist-info/METADATA")]
            if not python:
                raise SourceError(f"{path} holds no package vllm")
            return Sources(
                "-".join(path.name.split("-")[:2]),
                [(PurePosixPath(name), wheel.read(name).decode()) for name in python],
                wheel.read(metadata[0]).decode() if metadata else None,
            )
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _read_folder(root: Path) -> Sources:
    files = sorted((root / "vllm").rglob("*.py"))
    if not files:
        raise SourceError(f"{root} holds no package vllm")
    found = sorted(root.glob("vllm-*.dist-info/METADATA"))
    return Sources(
        str(root),
        [(PurePosixPath(file.relative_to(root)), file.read_text("utf-8")) for file in files],
        found[0].read_text("utf-8") if found else None,
    )
