# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop check`, with a stand-in for vLLM."""

import importlib
import json
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from checkpoint_json import write_json, write_llava, write_llava_next, write_qwen3_vl
from packaging.requirements import Requirement
from typer.testing import CliRunner

import vllm_crop
from tests.supported_window import FIRST, LAST, NEWER, NEXT, PREVIOUS
from vllm_crop.commands.check import check
from vllm_crop.compat import diagnosis, supported
from vllm_crop.compat.changes import CHANGES
from vllm_crop.compat.points import UPSTREAM_POINTS, UpstreamPoint
from vllm_crop.compat.refusals import REFUSED
from vllm_crop.compat.supported import SUPPORTED_VERSIONS, UNTESTED, find_problem
from vllm_crop.config import CropConfig
from vllm_crop.errors import MissingCompilerError
from vllm_crop.eviction.refusals import refused_with_eviction
from vllm_crop.eviction.report import recommended_layer, savings
from vllm_crop.planning.budget import check_eviction_layers

app = typer.Typer()
app.command()(check)


def run(*options: str) -> Any:
    return CliRunner().invoke(app, options, env={"COLUMNS": "200"})


def report(exit_code: int, *options: str) -> dict[str, Any]:
    result = run(*options, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def fine_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supported vLLM whose only upstream point is in the standard library."""
    vllm = ModuleType("vllm")
    vllm.__version__ = f"{LAST}+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(diagnosis, "UPSTREAM_POINTS", (UpstreamPoint("json", "dumps", ("obj",), "writes"),))
    monkeypatch.setattr(diagnosis, "EVICTION_POINTS", ())
    monkeypatch.setattr(diagnosis, "HEAT_POINTS", ())
    monkeypatch.setattr(diagnosis, "CPU_RUNNER_POINTS", ())
    monkeypatch.setattr(diagnosis, "require_compiler", lambda: None)
    monkeypatch.setattr(diagnosis, "_found_entry_points", lambda group=None: {"crop": "vllm_crop:register"})
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)


def test_a_fine_installation() -> None:
    found = report(0)
    assert found["ok"]
    assert found["problems"] == []
    assert found["versions"]["vllm"] == f"{LAST}+cpu"
    assert found["upstream_points"] == [{"name": "json.dumps", "reason": "writes", "problem": None}]
    assert found["entry_points"] == {"crop": "vllm_crop:register"}
    assert found["refused"] == REFUSED
    assert found["refused_with_eviction"] == refused_with_eviction()
    assert found["model"] is None


@pytest.mark.parametrize("error", [MissingCompilerError("no g++"), AttributeError("is_cpu")])
def test_what_keeps_a_cpu_from_compiling_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(diagnosis, "require_compiler", fail)
    (problem,) = report(1)["problems"]
    assert str(error) in problem


def test_every_setting_is_listed_with_its_default() -> None:
    listed = {setting["key"]: setting for setting in report(0)["config"]}
    plain = CropConfig().model_dump()
    nested = {name: plain.pop(name) for name in ("foveation", "limits", "localizer", "resampler", "shadow")}
    for name, keys in nested.items():
        plain |= {f"{name}.{key}": value for key, value in keys.items()}
    assert {key: setting["default"] for key, setting in listed.items()} == plain
    assert all(setting["description"] for setting in listed.values())


def test_the_report_for_people_is_short_and_ends_with_the_verdict() -> None:
    lines = run().stdout.splitlines()
    assert len(lines) < 30
    assert any(re.fullmatch(r"  (\d+) of \1 are as they should be", line) for line in lines)
    assert lines[-1].startswith("Pruning can start: vllm serve")


def test_the_whole_report_for_people_says_the_same() -> None:
    result = run("--all")
    assert result.exit_code == 0
    for text in ("Pruning can start", "json.dumps", "LlavaForConditionalGeneration", "pruning_rate", "0.778"):
        assert text in result.stdout
    for flag in (*REFUSED, *refused_with_eviction()):
        assert flag in result.stdout


@pytest.mark.parametrize("points", ["EVICTION_POINTS", "HEAT_POINTS", "CPU_RUNNER_POINTS"])
def test_points_of_eviction_are_checked_too(points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, points, (UpstreamPoint("json", "vanished", (), ""),))
    assert "json.vanished is gone" in report(1)["problems"]


@pytest.mark.parametrize(
    ("point", "problem"),
    [
        (UpstreamPoint("json", "vanished", (), ""), "json.vanished is gone"),
        (UpstreamPoint("json", "dumps", ("value",), ""), "expected ('value',)"),
    ],
)
def test_a_changed_upstream_point_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, point: UpstreamPoint, problem: str
) -> None:
    monkeypatch.setattr(diagnosis, "UPSTREAM_POINTS", (point,))
    found = report(1)
    assert problem in found["problems"][0]
    assert problem in found["upstream_points"][0]["problem"]
    result = run()
    assert result.exit_code == 1
    assert "Pruning would not start" in result.stdout
    assert problem in result.stdout


def test_an_upstream_module_that_fails_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(point: UpstreamPoint) -> str | None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(diagnosis, "find_problem", fail)
    assert "torchvision::nms" in report(1)["problems"][0]


def test_no_vllm_is_said_and_the_rest_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    found = report(1, "--model", write_llava(tmp_path))
    assert found["versions"]["vllm"] == "not installed"
    assert found["problems"] == ["vllm is not installed; vllm-crop supports vllm" + found["supported_vllm"]]
    assert found["upstream_points"] == []
    assert found["model"]["supported"]
    assert "not checked" in run().stdout


def test_another_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", PREVIOUS)
    assert report(1)["problems"] == [f"vllm-crop supports vllm{SUPPORTED_VERSIONS}, installed is {PREVIOUS}"]


@pytest.mark.parametrize("version", [FIRST, f"{FIRST}+cpu", LAST, f"{LAST}.post1", f"{LAST}+cu129"])
def test_a_release_is_no_problem(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    monkeypatch.delenv(UNTESTED, raising=False)
    assert report(0)["warnings"] == []


@pytest.mark.parametrize("value", ["", "0", "false", "No"])
def test_no_is_no(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", NEXT)
    monkeypatch.setenv(UNTESTED, value)
    assert f"set {UNTESTED}=1" in report(1)["problems"][0]


@pytest.mark.parametrize("version", [*NEWER, "1.0.0rc1", "dev", "0.1.dev1+g2"])
def test_a_newer_version_can_be_tried(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    monkeypatch.delenv(UNTESTED, raising=False)
    (problem,) = report(1)["problems"]
    assert f"supports vllm{SUPPORTED_VERSIONS}, installed is {version}" in problem
    assert f"set {UNTESTED}=1" in problem
    monkeypatch.setenv(UNTESTED, "1")
    found = report(0)
    assert (found["problems"], len(found["warnings"])) == ([], 1)
    assert f"installed is {version}, which is not tested" in found["warnings"][0]
    assert "Not tested" in run().stdout


@pytest.mark.parametrize("version", [PREVIOUS, f"{FIRST}rc1", f"{FIRST}.dev1"])
def test_an_older_version_cannot_be_tried(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    monkeypatch.setenv(UNTESTED, "1")
    assert report(1)["problems"] == [f"vllm-crop supports vllm{SUPPORTED_VERSIONS}, installed is {version}"]


def test_a_version_that_is_tried_is_checked_for_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", NEXT)
    monkeypatch.setenv(UNTESTED, "1")
    point = UpstreamPoint("json", "dumps", ("other",), "writes")
    monkeypatch.setattr(diagnosis, "UPSTREAM_POINTS", (point,))
    found = report(1)
    assert len(found["warnings"]) == 1
    (problem,) = found["problems"]
    assert problem.startswith("json.dumps takes ('obj',")


@pytest.mark.parametrize(("selected", "exit_code"), [("crop", 0), ("other,crop", 0), ("other", 1), ("", 1)])
def test_vllm_plugins_must_name_crop(monkeypatch: pytest.MonkeyPatch, selected: str, exit_code: int) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", selected)
    problems = report(exit_code)["problems"]
    assert all("VLLM_PLUGINS" in problem for problem in problems)
    assert len(problems) == exit_code


def test_a_missing_entry_point_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "EVICTION_POINTS", ())
    monkeypatch.setattr(diagnosis, "HEAT_POINTS", ())
    monkeypatch.setattr(diagnosis, "CPU_RUNNER_POINTS", ())
    monkeypatch.setattr(diagnosis, "_found_entry_points", lambda group=None: {})
    assert "no entry point 'crop'" in report(1)["problems"][0]


def test_the_rust_front_end_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND" in report(1)["problems"][0]


def test_a_supported_checkpoint(tmp_path: Path) -> None:
    model = write_llava(tmp_path)
    described = report(0, "--model", model)["model"]
    assert described["supported"]
    assert described["tokens_per_image"] == 576
    assert "supported: 576 tokens" in run("--model", model).stdout


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"localizer": {"kind": "attention", "layers": [40]}}, "decoder layers are 0 to"),
        ({"localizer": {"kind": "attention", "when_unsure": "late"}}, "needs eviction_layers whose last one"),
        ({"compression": "foveate"}, "one tile of a fixed size"),
        ({"method": "ilp", "pruning_rate": 0.99}, "pruning_rate of at most"),
    ],
)
def test_settings_that_do_not_suit_the_checkpoint(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    model, given = write_llava(tmp_path), ("--crop-config", json.dumps(settings))
    (problem,) = report(1, "--model", model, *given)["problems"]
    assert reason in problem
    assert report(0, *given)["ok"], "without a model nobody can say so"


@pytest.mark.parametrize(
    ("write", "settings", "reason"),
    [
        (write_qwen3_vl, {"unseen_tiles": "left_out"}, "foveation.unseen_tiles has no effect"),
        (write_llava_next, {"halo": 1}, "foveation.halo has no effect"),
    ],
)
def test_settings_of_another_vision_tower(
    tmp_path: Path, write: Callable[[Path], str], settings: dict[str, Any], reason: str
) -> None:
    given = json.dumps({"compression": "foveate", "foveation": settings})
    (problem,) = report(1, "--model", write(tmp_path), "--crop-config", given)["problems"]
    assert reason in problem


def test_position_ids_that_the_model_cannot_have(tmp_path: Path) -> None:
    given = json.dumps({"position_ids": "renumbered"})
    (problem,) = report(1, "--model", write_qwen3_vl(tmp_path), "--crop-config", given)["problems"]
    assert "M-RoPE" in problem


def test_a_missing_checkpoint_is_said_once(tmp_path: Path) -> None:
    assert len(report(1, "--model", str(tmp_path), "--crop-config", "{}")["problems"]) == 1


def test_what_can_start_is_said_as_it_is_started(tmp_path: Path) -> None:
    given = json.dumps({"compression": "foveate", "localizer": {"kind": "attention"}})
    said = run("--model", write_qwen3_vl(tmp_path), "--crop-config", given).stdout
    assert said.rstrip().endswith(f"vllm serve {tmp_path} --plugin crop --crop-config '{given}'")


def test_settings_alone() -> None:
    listed = json.loads(run("--settings", "--json").stdout)
    assert listed == report(0)["config"]
    said = run("--settings").stdout
    assert "localizer.whole_below" in said
    assert "Versions" not in said


def test_what_a_checkpoint_would_save(tmp_path: Path) -> None:
    """LLaVA-1.5-13B by hand: 40 layers, 2 of them below the eviction layer, in 20 groups of two."""
    model = write_llava(tmp_path)
    described = report(0, "--model", model)["model"]
    assert (described["eviction_layers"], described["kv_groups"]) == ([2], 20)
    rows = {(one["pruning_rate"], one["method"]): one for one in described["savings"]}
    assert len(rows) == 9
    assert rows[0.889, "plc"]["image_tokens"] == [64]
    assert rows[0.889, "plc"]["kv"] == 128 / 640
    first, later = rows[0.889, "ilp"]["image_tokens"]
    assert first == 576
    assert (2 * first + 38 * later) / 40 == pytest.approx(64, abs=0.5)
    blocks = -(-(64 + later) // 16)
    assert rows[0.889, "ilp"]["kv"] == (1 * 40 + 19 * blocks) * 2 * 16 / (40 * 640)
    printed = run("--model", model).stdout
    for text in ("eviction_layers [2]", "20 KV cache groups", f"576, {later}", "0.20x"):
        assert text in printed


@pytest.mark.parametrize("num_layers", [1, 2, 12, 28, 32, 80])
def test_the_recommended_layer_leaves_something_of_every_budget(num_layers: int) -> None:
    layer = recommended_layer(num_layers)
    assert layer >= 1
    if num_layers >= 12:
        check_eviction_layers((layer,), num_layers)
        assert len(savings(576, num_layers, layer)) == 9
    assert recommended_layer(num_layers, first=3) >= 3


def test_an_unsupported_checkpoint(tmp_path: Path) -> None:
    model = write_json(tmp_path, config={"architectures": ["LlamaForCausalLM"]})
    described = report(1, "--model", model)["model"]
    assert not described["supported"]
    assert "LlamaForCausalLM" in described["reason"]
    assert "not supported" in run("--model", model).stdout


def test_the_real_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert diagnosis._found_entry_points().get("crop") == "vllm_crop:register"


def test_a_checkpoint_with_several_grids(tmp_path: Path) -> None:
    model = write_llava_next(tmp_path)
    described = report(0, "--model", model)["model"]
    assert [one["grid"] for one in described["grids"]] == [[24, 24], [36, 48]]
    assert described["tokens_per_image"] == 2340
    said = run("--model", model).stdout
    assert (
        "2340 tokens for an image of 640x480 (24 x 24 and 36 x 48 with newlines), 32 decoder layers" in said
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "upstream_like.function is gone"),
        ("other = 1", "upstream_like.function is gone"),
        ("import a_library_that_is_missing", "upstream_like cannot be imported: No module named"),
        ("raise ImportError('libcuda.so: no such file')", "upstream_like cannot be imported: libcuda.so"),
        ("import json; json.moved", "upstream_like cannot be imported: module 'json' has no"),
        ("raise NotImplementedError", "upstream_like cannot be imported: NotImplementedError"),
        ("function = None", "upstream_like.function is a NoneType, expected a function"),
        ("function = property(id)", "upstream_like.function is a property, expected a function"),
        ("async def function(): ...", "upstream_like.function is a coroutine, expected a function"),
        ("async def function(): yield", "upstream_like.function is an async generator, expected a function"),
        ("def function(*, more): ...", "upstream_like.function requires ('more',) besides what is given"),
        ("def function(more): ...", "upstream_like.function requires ('more',) besides what is given"),
    ],
)
def test_what_is_gone_and_what_is_broken_beneath_are_told_apart(
    source: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "upstream_like.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "upstream_like", raising=False)
    found = find_problem(UpstreamPoint("upstream_like", "function", (), "is called"))
    monkeypatch.delitem(sys.modules, "upstream_like", raising=False)
    assert found is not None
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("source", "given"),
    [
        ("def function(*rest, one=1, **others): ...", ("iterable",)),
        ("class function: ...", ()),
        ("def function(iterable, *, other=1): ...", ("iterable", "other")),
    ],
)
def test_what_can_be_called_as_before_is_no_problem(
    source: str, given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "upstream_like.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "upstream_like", raising=False)
    point = UpstreamPoint("upstream_like", "function", (), "is called", given=given)
    assert find_problem(point) is None
    monkeypatch.delitem(sys.modules, "upstream_like", raising=False)


def test_what_is_given_by_name_must_be_taken() -> None:
    for given, said in (("altchars", None), ("gone", "base64.b64decode does not take ('gone',)")):
        assert find_problem(UpstreamPoint("base64", "b64decode", ("s",), "", given=(given,))) == said


def test_what_could_not_be_hooked_into_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "_UNHOOKED", {"vllm.x": "vllm-crop cannot hook into vllm.x: it has no Y"})
    assert report(1)["problems"] == ["vllm-crop cannot hook into vllm.x: it has no Y"]


def test_the_window_is_the_same_everywhere() -> None:
    """In the code, the extra, the table of README and what CI runs."""
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (vllm,) = [Requirement(one) for one in extras["vllm"] if Requirement(one).name == "vllm"]
    assert vllm.specifier == SUPPORTED_VERSIONS
    (row,) = re.findall(r"^\| 0\.\d+ \| ([^|]+) \|", (root / "README.md").read_text(), re.M)
    first, last = (f"{one.rpartition('.')[0]}.*" for one in (FIRST, LAST))
    assert row.split(", ")[0] == first
    assert row.split(", ")[-1] == last
    assert f"ALSO={LAST.rpartition('.')[0]} " in (root / ".ci/run").read_text()


def test_only_what_the_model_is_made_of_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "UPSTREAM_POINTS", UPSTREAM_POINTS)
    monkeypatch.setattr(diagnosis, "find_problem", lambda point: None)
    files = "vllm.model_executor.models."
    every = {point["name"] for point in report(0)["upstream_points"]}
    ours = {point["name"] for point in report(0, "--model", write_qwen3_vl(tmp_path))["upstream_points"]}
    assert f"{files}llava.LlavaForConditionalGeneration.embed_multimodal" in every - ours
    assert f"{files}qwen3_vl.Qwen3VLForConditionalGeneration.embed_multimodal" in ours
    assert f"{files}config.MODELS_CONFIG_MAP" in ours
    assert "vllm.v1.engine.async_llm.AsyncLLM.generate" in ours


def test_every_change_is_listed() -> None:
    """A patch module without a row, or a row that is not printed, would be a change nobody is told of."""
    patches = Path(diagnosis.__file__).parent / "patches"
    reasons = {
        importlib.import_module(f"vllm_crop.compat.patches.{path.stem}").REASON
        for path in patches.glob("*.py")
        if path.stem != "__init__"
    }
    assert reasons <= {change.why for change in CHANGES if change.kind == "patch"}
    assert report(0)["changes"] == [asdict(change) for change in CHANGES]
    printed = " ".join(run("--all").stdout.split())
    for change in CHANGES:
        assert " ".join(change.why.split()) in printed, change


def test_every_class_of_a_change_is_there() -> None:
    """Rows name classes: one that is renamed must be renamed there too."""
    library = Path(vllm_crop.__file__).parent
    sources = "\n".join(path.read_text() for path in library.rglob("*.py") if path.name != "changes.py")
    for change in CHANGES:
        names = re.findall(r"(?:Crop|Eviction|Stage)\w+", change.where)
        assert all(f"class {name}" in sources or name in ("CropMiddleware",) for name in names), change.where
