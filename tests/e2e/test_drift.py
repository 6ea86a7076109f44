# SPDX-License-Identifier: Apache-2.0
"""Following vLLM for real: two releases compared, and a changed point found before and at start."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lab.drift.__main__ import find_drift
from lab.drift.report import Drift
from lab.drift.sources import open_vllm

ROOT = Path(__file__).parents[2]
CHANGED = "vllm.multimodal.processing.processor.BaseMultiModalProcessor._get_mm_hashes"


def run(site: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a program with the vLLM of a folder in front of the installed one."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500, env=env)


@pytest.fixture(scope="module")
def installed() -> Path:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


@pytest.fixture(scope="module")
def changed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed vLLM with one parameter of a registered point renamed; all else are links."""
    site = tmp_path_factory.mktemp("site")
    for file in (installed / "vllm").rglob("*"):
        if file.is_file():  # compiled files, too: to make them anew takes as long as all else here
            link = site / file.relative_to(installed)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    processor = site / "vllm/multimodal/processing/processor.py"
    head, signature, tail = processor.read_text().partition("def _get_mm_hashes(self, inputs")
    assert signature
    for compiled in (processor.parent / "__pycache__").glob("processor.*"):
        compiled.unlink()
    processor.unlink()
    processor.write_text(f"{head}def _get_mm_hashes(self, wanted{tail}")
    return site


@pytest.fixture(scope="module")
def releases() -> Drift:
    wheels = ROOT / "build" / "wheels"
    return find_drift(open_vllm("0.32.0", wheels), open_vllm("0.33.0", wheels), ROOT)


@pytest.mark.package_index
def test_every_name_relied_on_can_be_followed(releases: Drift) -> None:
    assert not [one.relied.title for one in releases.findings if one.verdict == "not found"]
    points = [one for one in releases.findings if one.relied.points]
    assert len(points) > 75
    assert len(releases.findings) > 300


@pytest.mark.package_index
def test_every_patch_is_followed(releases: Drift) -> None:
    files = {file.stem for file in (ROOT / "vllm_crop/compat/patches").glob("[a-z]*.py")}
    found = {
        where.rpartition(".")[2] for one in releases.findings for where in one.relied.ways.get("patched", ())
    }
    assert found == files


@pytest.mark.package_index
def test_from_0_32_to_0_33_every_point_keeps_its_arguments(releases: Drift) -> None:
    assert not [one.relied.title for one in releases.findings if one.broken]
    verdicts = {one.relied.title: one.verdict for one in releases.findings if one.relied.points}
    assert verdicts["vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.cache_blocks"] == (
        "body changed"
    )
    assert verdicts["vllm.v1.core.block_pool.BlockPool.get_cached_block"] == "same"
    assert verdicts["vllm.compilation.decorators.support_torch_compile"] == "arguments changed"


@pytest.mark.package_index
def test_from_0_32_to_0_33_more_models_and_requirements_came(releases: Drift) -> None:
    assert "Step5ForConditionalGeneration" in {one.name for one in releases.architectures if one.old is None}
    requirements = {one.name: (one.old, one.new) for one in releases.requirements}
    assert requirements["torch"] == ("==2.13.0", "==2.14.0")
    assert requirements["orjson"][0] is None


def test_drift_finds_a_changed_point(installed: Path, changed: Path) -> None:
    found = run(changed, "-m", "lab.drift", str(installed), str(changed), "--no-diffs")
    assert found.returncode == 2, found.stderr
    assert f"arguments changed  {CHANGED}" in found.stdout
    assert "takes ('self', 'wanted'), expected ('self', 'inputs')" in found.stdout
    assert "Something breaks" in found.stdout


def test_check_finds_a_changed_point(changed: Path) -> None:
    found = run(changed, str(Path(sys.executable).with_name("vllm-crop")), "check")
    assert found.returncode == 1, found.stderr
    assert f"problem  {CHANGED}" in found.stdout
    assert f"- {CHANGED} takes ('self', 'wanted'), expected ('self', 'inputs')" in found.stdout


def test_a_server_with_a_changed_point_does_not_start(changed: Path, checkpoint: Path) -> None:
    command = ("-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), "--plugin", "crop", "--port", "0")
    started = run(changed, *command, "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")
    assert started.returncode != 0
    assert f"{CHANGED} takes ('self', 'wanted'), expected ('self', 'inputs')" in started.stderr


@pytest.mark.package_index
def test_the_overlay_knows_every_operator_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docker/cpu/overlay.py asks before it puts 0.33's Python over 0.32's extensions."""
    monkeypatch.syspath_prepend(str(ROOT / "docker" / "cpu"))
    import overlay_ops

    compiled = overlay_ops.operators(Path(sys.executable))
    before, after = (open_vllm(version, ROOT / "build" / "wheels") for version in ("0.32.0", "0.33.0"))
    texts = [[(module, vllm.text(module)) for module in vllm] for vllm in (before, after)]
    assert overlay_ops.misfits(compiled, *texts) == []
    monkeypatch.setattr(overlay_ops, "KNOWN", {})
    assert {one.split(" gives ")[1].split()[0] for one in overlay_ops.misfits(compiled, *texts)} == {
        "fused_experts_cpu"
    }
