# SPDX-License-Identifier: Apache-2.0
"""`lab.drift` on small made-up vLLMs: each way to rely on a name, and each thing that becomes of it."""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.drift.__main__ import app, find_drift
from lab.drift.comparison import Finding
from lab.drift.report import Drift
from lab.drift.sources import open_vllm
from vllm_crop.compat.points import UpstreamPoint

VLLM = {
    "__init__": 'MODULE_ATTRS = {"LLM": ".entrypoints.llm:LLM"}\ndef __getattr__(name): ...\n',
    "entrypoints.llm": "class LLM:\n    def generate(self, prompts, params=None):\n        return prompts\n",
    "core.__init__": "from .block_pool import BlockPool as BlockPool\nfrom vllm.core.specs import *\n",
    "core.block_pool": """
        class Base:
            def free(self, block):
                '''Give a block back.'''
                return block
        class BlockPool(Base):
            size: int = 3
            def __init__(self, size):
                self.blocks = [size]
            @classmethod
            def build(cls, size, kind):
                return cls(size)
    """,
    "core.specs": "def make_spec(name, *, depth=1):\n    # where it is made\n    return name, depth\n",
    "platforms": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from vllm.core.specs import make_spec
        def __getattr__(name):
            if name == "current_platform":
                return 1
    """,
    "registry": "class Registry:\n    def add(self, name): return name\nREGISTRY = Registry()\n",
    "model_executor.models.registry": '_MULTIMODAL_MODELS = {"LlavaModel": ("llava", "LlavaModel")}\n',
}
OURS = {
    "vllm_crop.patches": '"""Wraps.\n\nReplaces: BlockPool.build (vllm/core/block_pool.py).\n"""\n',
    "vllm_crop.pool": """
        import importlib
        from vllm import LLM
        from vllm.core import BlockPool, make_spec
        from vllm.registry import REGISTRY
        from vllm_crop.mixin import Mixin

        class OurPool(Mixin, BlockPool):
            def take(self):
                return self.blocks

        def use(pool: "BlockPool | None"):
            LLM.generate
            REGISTRY.add("x")
            importlib.import_module("vllm.platforms").current_platform
            return "vllm.core.block_pool.Base"
    """,
    "vllm_crop.mixin": "class Mixin:\n    def free(self, block):\n        return super().free(block)\n",
    "tests.lazy": """
        def test():
            try:
                from vllm.core.newer import make_spec
            except ModuleNotFoundError:
                from vllm.core.specs import make_spec
    """,
}
POINT = UpstreamPoint("vllm.core.block_pool", "BlockPool.build", ("size", "kind"), "builds")


def write(root: Path, modules: Mapping[str, str]) -> Path:
    for module, text in modules.items():
        file = root.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        indent = len(text) - len(text.lstrip("\n ")) - 1 if text.startswith("\n") else 0
        file.write_text("\n".join(line[indent:] for line in text.split("\n")))
    return root


def drift(
    tmp_path: Path, changed: Mapping[str, str | None] | None = None, points: tuple[UpstreamPoint, ...] = ()
) -> Drift:
    """What is found when modules of VLLM become others, or go (None)."""
    new = {name: text for name, text in (VLLM | dict(changed or {})).items() if text is not None}
    for name, modules in (("old", VLLM), ("new", new)):
        write(tmp_path / name / "vllm", modules)
    ours = write(tmp_path / "ours", OURS)
    return find_drift(*(open_vllm(str(tmp_path / name), tmp_path) for name in ("old", "new")), ours, points)


def finding(drift: Drift, title: str) -> Finding:
    (found,) = [one for one in drift.findings if one.relied.title == title]
    return found


def verdicts(drift: Drift) -> dict[str, str]:
    """What is not the same."""
    return {one.relied.title: one.verdict for one in drift.findings if one.verdict != "same"}


def edited(module: str, old: str, new: str) -> str:
    assert old in VLLM[module]
    return VLLM[module].replace(old, new)


def test_everything_relied_on_is_found(tmp_path: Path) -> None:
    found = drift(tmp_path, points=(POINT,))
    assert {one.relied.title: sorted(one.relied.ways) for one in found.findings} == {
        "vllm.core.block_pool.BlockPool.build": ["patched", "point"],
        "vllm.core.block_pool.BlockPool.blocks": ["inherited"],
        "vllm.core.block_pool.BlockPool.free": ["inherited", "overridden"],
        "vllm.core.BlockPool": ["imported"],
        "vllm.core.make_spec": ["imported"],
        "vllm.LLM": ["imported"],
        "vllm.LLM.generate": ["used"],
        "vllm.registry.REGISTRY": ["imported"],
        "vllm.registry.REGISTRY.add": ["used"],
        "vllm.platforms": ["named"],
        "vllm.platforms.current_platform": ["used"],
        "vllm.core.block_pool.Base": ["named"],
        "vllm.core.newer.make_spec or vllm.core.specs.make_spec": ["imported"],
    }
    assert (verdicts(found), found.severity) == ({}, 0)


def test_comments_docstrings_and_formatting_do_not_count(tmp_path: Path) -> None:
    text = edited("core.block_pool", "'''Give a block back.'''", "'''Other words.'''\n                # why")
    spec = 'def make_spec(\n    name,\n    *,\n    depth=1,\n):\n    """New."""\n    return (name, depth)\n'
    assert drift(tmp_path, {"core.block_pool": text, "core.specs": spec}).severity == 0


def test_another_body_is_shown(tmp_path: Path) -> None:
    found = drift(tmp_path, {"core.block_pool": edited("core.block_pool", "return block", "return [block]")})
    assert verdicts(found) == {"vllm.core.block_pool.BlockPool.free": "body changed"}
    shown = finding(found, "vllm.core.block_pool.BlockPool.free").diff
    assert "-    return block\n+    return [block]" in shown
    assert found.severity == 1


def test_other_arguments_are_shown(tmp_path: Path) -> None:
    found = drift(tmp_path, {"core.specs": edited("core.specs", "*, depth=1", "depth=2")})
    one = finding(found, "vllm.core.make_spec")
    assert (one.verdict, one.detail) == ("arguments changed", ("(name, *, depth=1)", "(name, depth=2)"))
    assert found.severity == 1


def test_a_function_that_must_be_awaited_now_is_another_call(tmp_path: Path) -> None:
    found = drift(tmp_path, {"entrypoints.llm": edited("entrypoints.llm", "def gen", "async def gen")})
    one = finding(found, "vllm.LLM.generate")
    assert one.detail == ("(self, prompts, params=None)", "async (self, prompts, params=None)")


@pytest.mark.parametrize(
    ("old", "new", "severity"),
    [
        ("size, kind)", "size, kind, more=1)", 1),
        ("size, kind)", "size, kind, *, more=1, **others)", 1),
        ("size, kind)", "size, kind, more)", 2),
        ("size, kind)", "size, kind, *, more)", 2),
        ("size, kind)", "size, sort)", 2),
        ("size, kind)", "kind, size)", 2),
        ("@classmethod", "@staticmethod", 2),
        ("def build", "async def build", 2),
        ("@classmethod", "@property", 2),
    ],
)
def test_what_a_point_can_be_called_with_decides(tmp_path: Path, old: str, new: str, severity: int) -> None:
    found = drift(tmp_path, {"core.block_pool": edited("core.block_pool", old, new)}, (POINT,))
    one = finding(found, "vllm.core.block_pool.BlockPool.build")
    assert (one.verdict, one.severity, found.severity) == ("arguments changed", severity, severity)
    assert (one.broken is not None) == (severity == 2)


@pytest.mark.parametrize(
    ("value", "severity"),
    [
        ('{"LlavaModel": ("llava", "LlavaModel"), "New": ("new", "New")}', 1),
        ("{name: name for name in ()}", 1),
        ("make_registry()", 2),
    ],
)
def test_a_table_that_is_written_into_must_be_one(tmp_path: Path, value: str, severity: int) -> None:
    registry = "model_executor.models.registry"
    table = UpstreamPoint(f"vllm.{registry}", "_MULTIMODAL_MODELS", (), "ours are added", kind="table")
    found = drift(tmp_path, {registry: f"_MULTIMODAL_MODELS = {value}\n"}, (table,))
    assert finding(found, f"vllm.{registry}._MULTIMODAL_MODELS").severity == severity


def test_a_moved_name_is_found_again(tmp_path: Path) -> None:
    moved = VLLM["core.specs"]
    core = edited("core.__init__", "from vllm.core.specs import *", "")
    found = drift(tmp_path, {"core.specs": None, "core.planning": moved, "core.__init__": core})
    one = finding(found, "vllm.core.make_spec")
    assert (one.verdict, one.detail) == ("gone", ("vllm.core.planning.make_spec",))
    assert found.severity == 2


def test_a_reexport_counts_like_the_name_itself(tmp_path: Path) -> None:
    found = drift(
        tmp_path,
        {"core.specs": "from vllm.core.planning import make_spec\n", "core.planning": VLLM["core.specs"]},
    )
    assert found.severity == 0


def test_what_our_sources_try_elsewhere_is_not_gone(tmp_path: Path) -> None:
    core = edited("core.__init__", "core.specs", "core.newer")
    newer = {"core.specs": None, "core.newer": VLLM["core.specs"], "core.__init__": core}
    found = drift(tmp_path, newer)
    assert verdicts(found) == {}


def test_what_a_type_checker_alone_imports_is_gone(tmp_path: Path) -> None:
    text = edited("registry", "REGISTRY = Registry()", "")
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm.other import REGISTRY\n"
    found = drift(tmp_path, {"registry": text + late, "other": VLLM["registry"]})
    assert finding(found, "vllm.registry.REGISTRY").verdict == "gone"


def test_a_lazy_name_that_goes_is_gone(tmp_path: Path) -> None:
    found = drift(tmp_path, {"__init__": "MODULE_ATTRS = {}\ndef __getattr__(name): ...\n"})
    one = finding(found, "vllm.LLM")
    assert (one.verdict, one.detail) == ("gone", ("vllm.entrypoints.llm.LLM",))


def test_an_attribute_that_is_set_no_more_is_gone(tmp_path: Path) -> None:
    text = edited("core.block_pool", "self.blocks = ", "self.pages = ")
    found = drift(tmp_path, {"core.block_pool": text})
    assert finding(found, "vllm.core.block_pool.BlockPool.blocks").verdict == "gone"


def test_a_method_that_moves_to_a_base_class_stays_the_same(tmp_path: Path) -> None:
    text = VLLM["core.block_pool"]
    build = text[text.index("            @classmethod") : text.index("    ", text.rindex("return cls(size)"))]
    moved = text.replace(build, "").replace("        class BlockPool", f"{build}        class BlockPool")
    found = drift(tmp_path, {"core.block_pool": moved}, (POINT,))
    assert finding(found, "vllm.core.block_pool.BlockPool.build").verdict == "same"


def test_what_only_the_new_one_has_is_said(tmp_path: Path) -> None:
    point = UpstreamPoint("vllm.core.later", "make", ("name",), "is called")
    found = drift(tmp_path, {"core.later": "def make(name): ...\n"}, (point,))
    assert (verdicts(found), found.severity) == ({"vllm.core.later.make": "new"}, 1)


def test_a_method_of_ours_that_would_replace_a_new_one_is_said(tmp_path: Path) -> None:
    build = "            @classmethod\n"
    text = edited("core.block_pool", build, f"            def take(self, count): return count\n{build}")
    found = drift(tmp_path, {"core.block_pool": text})
    assert (verdicts(found), found.severity) == ({"vllm.core.block_pool.BlockPool.take": "new"}, 1)


def test_a_point_that_neither_has_breaks(tmp_path: Path) -> None:
    found = drift(
        tmp_path, points=(UpstreamPoint("vllm.core.block_pool", "BlockPool.missing", (), "is called"),)
    )
    assert verdicts(found) == {"vllm.core.block_pool.BlockPool.missing": "not found"}
    assert found.severity == 2


def test_architectures_and_requirements(tmp_path: Path) -> None:
    for name, line in (
        ("old", "torch==2.13.0"),
        ("new", 'torch==2.14.0\nRequires-Dist: ray; extra == "ray"'),
    ):
        folder = tmp_path / name / "vllm-1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: vllm\nRequires-Dist: numpy\nRequires-Dist: {line}\n\nText\n")
    registry = '_MULTIMODAL_MODELS = {"PixelModel": ("pixel", "PixelModel")}\n'
    found = drift(tmp_path, {"model_executor.models.registry": registry})
    assert [(one.name, one.old, one.new) for one in found.architectures] == [
        ("LlavaModel", "llava", None),
        ("PixelModel", None, "pixel"),
    ]
    assert [(one.name, one.old, one.new) for one in found.requirements] == [("torch", "==2.13.0", "==2.14.0")]
    assert found.severity == 1


def test_a_wheel_reads_like_its_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "files" / "vllm", VLLM).parent
    wheel = tmp_path / "vllm-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(root.rglob("*.py")):
            archive.write(file, file.relative_to(root))
    read = [open_vllm(name, tmp_path) for name in (str(wheel), "9.9.9", str(root))]
    assert len({tuple((module, one.text(module)) for module in sorted(one)) for one in read}) == 1


def test_the_command_teaches_and_refuses(tmp_path: Path) -> None:
    taught = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert "Exit code" in taught.output
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    refused = CliRunner().invoke(app, [str(tmp_path), str(tmp_path)])
    assert refused.exit_code == 2
    assert "holds no package vllm" in refused.output


def test_a_vllm_for_a_newer_python_is_said_to_be_one(tmp_path: Path) -> None:
    """And is no reason to exit as if all of it had been read, which 1 would say."""
    old = write(tmp_path / "old" / "vllm", VLLM).parent
    new = write(tmp_path / "new" / "vllm", {**VLLM, "sampling_params": "match = \n"}).parent
    ran = CliRunner().invoke(app, [str(old), str(new)], env={"COLUMNS": "200"})
    assert ran.exit_code == 2, ran.output
    assert "vllm.sampling_params cannot be read by Python" in ran.output
    assert "Traceback" not in ran.output
