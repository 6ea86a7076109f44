# SPDX-License-Identifier: Apache-2.0
"""The images, as far as files tell: `make image-test` builds one and asks it."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, entry_points, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lab.demo.setting import MODEL, SERVER_OPTIONS
from vllm_crop.compat.supported import SUPPORTED_VERSIONS

ROOT = Path(__file__).parents[2]
DOCKERFILES = {name: ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")}
SERVED = ROOT / "docker" / "tinyvqa.yaml"


@pytest.fixture
def from_docker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of docker/, as the programs there do."""
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    return importlib.import_module


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile's last stage, without comments and line ends."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILES[name].read_text(), flags=re.MULTILINE).replace("\\\n", "")
    stage = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[-1]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in stage.splitlines() if line)]


def environment(name: str) -> dict[str, str]:
    """What ENV sets in a Dockerfile's last stage."""
    return {
        key: value
        for word, rest in instructions(name)
        if word == "ENV"
        for key, value in re.findall(r"(\w+)=(\S+)", rest)
    }


@pytest.mark.parametrize("file", DOCKERFILES.values(), ids=list(DOCKERFILES))
def test_hadolint(file: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    finished = subprocess.run([linter, "--no-color", file], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_page_is_served_and_plugins_of_vllm_stay(name: str) -> None:
    named = environment(name)["VLLM_PLUGINS"].split(",")
    own = [
        point.name for point in entry_points(group="vllm.general_plugins") if point.module.startswith("vllm.")
    ]
    assert named == ["crop", *sorted(own)]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_nobody_serves_as_root(name: str) -> None:
    given = dict(instructions(name))
    assert "SERVE_AS=2000:0" in (f"SERVE_AS={given['USER']}", given.get("ARG"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_counters_of_a_crashed_run_are_not_kept(name: str) -> None:
    # vLLM makes a new folder for them where it needs one, but only while this is not set.
    assert "PROMETHEUS_MULTIPROC_DIR" not in environment(name)


def test_arguments_take_the_place_of_what_is_served() -> None:
    given = dict(instructions("Dockerfile.cpu"))
    assert json.loads(given["ENTRYPOINT"]) == ["vllm", "serve"]
    assert json.loads(given["CMD"]) == ["--config", "/etc/vllm-crop/tinyvqa.yaml"]
    assert not {"ENTRYPOINT", "CMD"} & dict(instructions("Dockerfile")).keys()  # the base's


def test_the_cpu_image_serves_what_the_demo_serves() -> None:
    served = yaml.safe_load(SERVED.read_text())
    own = {"model": "/models/tinyvqa", "served-model-name": "tinyvqa", "kv-cache-memory-bytes": 1 << 30}
    own["shutdown-timeout"] = 60
    options = dict(zip(SERVER_OPTIONS[:-1:2], SERVER_OPTIONS[1::2], strict=True))
    demo = {name.removeprefix("--"): value for name, value in options.items()}
    demo["crop-config"] = json.loads(demo["crop-config"])
    for name in ("max-model-len", "block-size"):
        demo[name] = int(demo[name])
    assert SERVER_OPTIONS[-1] == "--enforce-eager"
    assert served == {**own, **demo, "enforce-eager": True}


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert (ROOT / MODEL / "model.safetensors").exists()
    for name in DOCKERFILES:
        copied = [rest.split()[0] for word, rest in instructions(name) if word == "COPY"]
        bound = re.findall(r"type=bind,source=([^,]+)", DOCKERFILES[name].read_text())
        for path in (*copied, *bound):
            assert (ROOT / path).exists(), path
            assert f"!{path}" in ignored, path


def test_the_official_image_is_one_that_is_supported() -> None:
    (tag,) = re.findall(r"^ARG VLLM_TAG=v(\S+)$", DOCKERFILES["Dockerfile"].read_text(), re.MULTILINE)
    assert tag in SUPPORTED_VERSIONS


def brought_along(distribution: str) -> dict[str, Requirement]:
    """What installing a distribution installs, by name."""
    found: dict[str, Requirement] = {}
    waiting = [Requirement(distribution)]
    while waiting:
        of = waiting.pop()
        for one in map(Requirement, of_metadata(of.name)):
            extras = of.extras or {""}
            wanted = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)
            if wanted and canonicalize_name(one.name) not in found:
                found[canonicalize_name(one.name)] = one
                waiting.append(one)
    return found


def of_metadata(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:  # of another platform
        return []


def test_vllm_brings_along_what_we_require() -> None:
    # Which is why the wheel can be installed into the official image with --no-deps.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with_vllm = brought_along("vllm")
    ours = {canonicalize_name(Requirement(one).name) for one in project["dependencies"]}
    assert ours - with_vllm.keys() == set()
    assert "--no-deps" in DOCKERFILES["Dockerfile"].read_text()


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution `wanting` and what it wants: met, too old, missing, for an extra."""
    lines = ("old>=2", "new>=2", "none", 'never; extra == "x"', 'never; python_version < "3"')
    for name, version, wants in (("wanting", "1", lines), ("old", "1.9", ()), ("new", "2.0rc1+cpu", ())):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
        (folder / "METADATA").write_text(
            "\n".join([*head, *(f"Requires-Dist: {one}" for one in wants), "", ""])
        )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("distributions")
def test_a_build_without_what_we_require_ends(from_docker: Any) -> None:
    requirements_met = from_docker("requirements_met")
    assert list(requirements_met.unmet("wanting")) == [
        "wanting requires old>=2, and 1.9 is installed",
        "wanting requires new>=2, and 2.0rc1+cpu is installed",
        "wanting requires none, which is not installed",
    ]
    assert list(requirements_met.unmet("vllm-crop")) == []


@pytest.mark.parametrize("program", ["docker", "podman"])
def test_what_docker_and_podman_are_told(
    from_docker: Any, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_tools, containers = from_docker("image_tools"), from_docker("containers")
    (told := tmp_path / "told").touch()
    (stand_in := tmp_path / program).write_text(f'#!/bin/sh\necho "$@" >>{told}\necho 0\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool = image_tools.Docker(program)
    assert (
        tool.build("docker/Dockerfile", "crop:gpu", Path("/p/pip.conf"), [Path("/mirror")], ["--quiet"]) == 0
    )
    container = containers.make_container(tool, "crop:cpu", 1234, tmp_path / "log")
    container.start()
    assert container.run("id", "-u").stdout == "0\n"
    container.kill()
    assert container.stop() == 0
    container.remove()
    containers.run_once(tool, "crop:cpu", "5:0", "vllm-crop", "check")
    lent = " --format docker --volume /mirror:/mirror:ro" if program == "podman" else ""
    assert told.read_text().splitlines() == [
        f"build -f docker/Dockerfile -t crop:gpu --secret id=pip.conf,src=/p/pip.conf{lent} --quiet .",
        "create -p 127.0.0.1:1234:8000 crop:cpu",
        "start 0",
        "exec 0 id -u",
        "kill --signal KILL 0",
        "stop -t 60 0",
        "inspect --format {{.State.ExitCode}} 0",
        "rm --force 0",
        "run --rm --user 5:0 --entrypoint vllm-crop crop:cpu check",
    ]


@pytest.mark.parametrize("isolation", [None, "chroot"])
def test_a_build_that_fails_says_what_else_can_be_tried(
    from_docker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolation: str | None
) -> None:
    build_image, image_tools = from_docker("build_image"), from_docker("image_tools")
    (stand_in := tmp_path / "buildah").write_text("#!/bin/sh\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("BUILDAH_ISOLATION", raising=False)
    if isolation:
        monkeypatch.setenv("BUILDAH_ISOLATION", isolation)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"buildah could not build docker/Dockerfile\.cpu") as ended:
        build_image.build(image_tools.Buildah(), "cpu", [])
    assert str(ended.value).endswith("BUILDAH_ISOLATION=chroot make image") == (isolation is None)


PIP_LISTS = """
:env:.default-timeout='180'
:env:.find-links='/of/the/environment'
global.cert='{cert}'
global.constraint='/etc/constraints.txt'
global.extra-index-url='https://mirror/simple\\nfile://{mirror}/simple'
global.find-links='/overruled'
install.user='true'
"""


def test_a_build_gets_packages_from_where_this_machine_does(from_docker: Any, tmp_path: Path) -> None:
    pip_sources = from_docker("pip_sources")
    (tmp_path / "simple").mkdir()
    (cert := tmp_path / "cert.pem").touch()
    settings = pip_sources.read(PIP_LISTS.format(cert=cert, mirror=tmp_path))
    assert settings == {
        "cert": str(cert),
        "extra-index-url": f"https://mirror/simple file://{tmp_path}/simple",
        "find-links": "/of/the/environment",
        "timeout": "180",
    }
    # The folder beside simple/ has the index's files; what does not exist cannot be lent.
    assert pip_sources.on_disk(settings) == [tmp_path, cert]
    assert pip_sources.as_file(settings).splitlines()[:2] == ["[global]", f"cert = {cert}"]
    assert pip_sources.as_file({}) == "[global]\n"


def test_a_tool_that_works_is_found(
    from_docker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image_tools = from_docker("image_tools")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("IMAGE_TOOL", raising=False)
    with pytest.raises(SystemExit, match="none of docker, podman and buildah works here"):
        image_tools.find_tool()
    for name, code in (("docker", 1), ("podman", 0), ("buildah", 0)):  # docker's daemon does not answer
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    assert image_tools.find_tool().name == "podman"
    monkeypatch.setenv("IMAGE_TOOL", "buildah")
    assert image_tools.find_tool().name == "buildah"
    monkeypatch.setenv("IMAGE_TOOL", "docker")
    with pytest.raises(SystemExit, match="docker does not work here"):
        image_tools.find_tool()
