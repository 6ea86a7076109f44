# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: in fresh interpreters by what is loaded, and in the sources by what is written."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_crop

LIBRARY = Path(vllm_crop.__file__).parent
# The last three measure, with vLLM's own load generator or an engine of their own.
MAY_IMPORT_VLLM = (
    *("models", "eviction", "heat", "runners", "frontend", "compat", "measuring", "benchmarking"),
    "calibrating",
)
HEAVY = ("torch", "vllm")

# What is run, and the packages or modules that must not be loaded by it.
LIGHT_IMPORTS = {
    "import vllm_crop": HEAVY,
    "import vllm_crop; vllm_crop.register()": HEAVY,
    "import vllm_crop; vllm_crop.register(); vllm_crop.register()": HEAVY,
    "import vllm_crop.planning.geometry": HEAVY,
    "import vllm_crop.errors": HEAVY,
    "import vllm_crop.planning.plan": (*HEAVY, "numba"),
    "import vllm_crop.request": HEAVY,
    "import vllm_crop.config": HEAVY,
    "import vllm_crop.families.llava": HEAVY,
    "import vllm_crop.families.registry": HEAVY,
    "import vllm_crop.frontend.request_context": HEAVY,
    "import vllm_crop.frontend.metrics": HEAVY,
    "import vllm_crop.compat.hf_overrides": HEAVY,
    "import vllm_crop.compat.refusals": HEAVY,
    "import vllm_crop.compat.hooks": HEAVY,
    "import vllm_crop.compat.diagnosis": HEAVY,
    "import vllm_crop.eviction.report": HEAVY,
    "import vllm_crop.heat.request": HEAVY,
    "import vllm_crop.heat.refusals": HEAVY,
    "import vllm_crop.heat.step": ("vllm",),
    "import vllm_crop.planner": HEAVY,
    "import vllm_crop.client": (*HEAVY, "openai"),
    "import vllm_crop.comparing.run": (*HEAVY, "openai"),
    "import vllm_crop.comparing.page": (*HEAVY, "openai"),
    "import vllm_crop.localizers.calibration": HEAVY,
    "import vllm_crop.lmms_eval": (*HEAVY, "lmms_eval"),
    "import vllm_crop.calibrating.data": (*HEAVY, "matplotlib"),
    "import vllm_crop.calibrating.rule": (*HEAVY, "matplotlib"),
    "import vllm_crop.commands.app": (
        *HEAVY,
        "numba",
        "openai",
        "matplotlib",
        "jinja2",
        "vllm_crop.benchmarking",
        "vllm_crop.calibrating",
        "vllm_crop.comparing",
        "vllm_crop.compat",
    ),
    "import lab.evaluation.__main__": HEAVY,
    "import lab.evaluation.session": HEAVY,
    "import lab.evaluation.report": HEAVY,
    "import vllm_crop.models.features": ("vllm",),
    "import vllm_crop_server.middleware": (*HEAVY, "vllm_crop.models", "vllm_crop.compat"),
    "import vllm_crop_server.playground": (*HEAVY, "vllm_crop.models", "vllm_crop.compat"),
}
# Distributions of what is imported under another name, or comes with another package.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "llvmlite": "vllm",
    "torch": "vllm",
    "transformers": "vllm",
    "numba": "vllm",
    "safetensors": "vllm",
    "lmms_eval": "lmms-eval",
    "tokenizers": "vllm",
}
ON_THEIR_OWN = ("vllm_crop.planning.geometry", "vllm_crop.errors")


def loaded_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after running a statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps([n for n, m in sys.modules.items() if m]))"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout))


@pytest.mark.parametrize("statement", LIGHT_IMPORTS)
def test_importing_loads_nothing_it_should_not(statement: str) -> None:
    loaded = loaded_after(statement)
    for forbidden in LIGHT_IMPORTS[statement]:
        assert sorted(name for name in loaded if f"{name}.".startswith(f"{forbidden}.")) == []
    module = statement.removeprefix("import ")
    if module in ON_THEIR_OWN:
        ours = {name for name in loaded if name.partition(".")[0].startswith("vllm_crop")}
        assert ours == {"vllm_crop", module, module.rpartition(".")[0]}


def sources(package: str) -> list[Path]:
    """Every Python file of an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return sorted(Path(spec.origin).parent.rglob("*.py"))


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Absolute module names in the import statements and `import_module("...")` calls of a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


def imports_of(source: Path) -> set[str]:
    """The names that a file imports, wherever in it."""
    return set(imported_names(ast.parse(source.read_text(encoding="utf-8"))))


def of_package(names: set[str], package: str) -> set[str]:
    """The names that lie in a package, itself included."""
    return {name for name in names if f"{name}.".startswith(f"{package}.")}


def test_only_models_frontend_compat_and_measurements_import_vllm() -> None:
    found = {
        str(source.relative_to(LIBRARY)): of_package(imports_of(source), "vllm")
        for source in sources("vllm_crop")
    }
    assert any(found.values()), "the scan sees no import at all"
    strays = {
        path: names for path, names in found.items() if names and Path(path).parts[0] not in MAY_IMPORT_VLLM
    }
    assert strays == {}


def test_the_server_imports_neither_vllm_nor_models_nor_compat() -> None:
    for source in sources("vllm_crop_server"):
        names = imports_of(source)
        for forbidden in ("vllm", "torch", "vllm_crop.models", "vllm_crop.compat"):
            assert of_package(names, forbidden) == set(), source


def test_the_library_never_imports_the_server() -> None:
    for source in sources("vllm_crop"):
        assert of_package(imports_of(source), "vllm_crop_server") == set(), source


def test_the_library_names_the_server_in_one_constant_only() -> None:
    mentions = []
    for source in sources("vllm_crop"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and "vllm_crop_server" in str(node.value):
                mentions.append((str(source.relative_to(LIBRARY)), node.value))
    constant = "vllm_crop_server.middleware.CropMiddleware"
    assert mentions == [(str(Path("compat", "patches", "cli_flags.py")), constant)]


def test_geometry_and_errors_import_nothing_of_ours() -> None:
    for name in ("planning/geometry", "errors"):
        assert of_package(imports_of(LIBRARY / f"{name}.py"), "vllm_crop") == set()


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((LIBRARY.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extra = ("vllm", "openai", "calibrate", "lmms-eval")
    declared = [*project["dependencies"], *(one for name in extra for one in extras[name])]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in declared}
    for source in (*sources("vllm_crop"), *sources("vllm_crop_server")):
        for name in imports_of(source):
            package = name.partition(".")[0]
            if package in sys.stdlib_module_names or package in (
                "_typeshed",
                "vllm_crop",
                "vllm_crop_server",
            ):
                continue
            assert DISTRIBUTIONS.get(package, package) in names, source


def test_rooms_do_not_look_into_each_other() -> None:
    """Between two folders or loose modules imports go one way: whoever reads one needs not read the other."""
    arrows = set()
    for source in sources("vllm_crop"):
        room = Path(source.relative_to(LIBRARY).parts[0]).stem
        for name in of_package(imports_of(source), "vllm_crop"):
            other = name.split(".")[1] if "." in name else room
            if (
                room not in (other, "__init__")
                and (LIBRARY / other).exists() | (LIBRARY / f"{other}.py").exists()
            ):
                arrows.add((room, other))
    assert len(arrows) > 40, "the scan sees hardly any import"
    assert sorted((one, other) for one, other in arrows if (other, one) in arrows) == []


def test_few_modules_lie_outside_the_rooms() -> None:
    loose = sorted(path.stem for path in LIBRARY.glob("*.py") if path.stem != "__init__")
    assert loose == ["client", "config", "crop_params", "errors", "planner", "request"]
