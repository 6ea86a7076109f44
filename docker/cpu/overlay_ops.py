# SPDX-License-Identifier: Apache-2.0
"""Which calls of a vLLM's Python do not fit the compiled operators of a CPU build."""

import ast
import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Differences that are known, and what is not tested because of them.
KNOWN = {"fused_experts_cpu": "quantised experts"}

_LIST_OPERATORS = """
import json, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("_C::")]
print(json.dumps({
    schema.name[4:]: [
        sum(not argument.has_default_value() for argument in schema.arguments), len(schema.arguments)
    ]
    for schema in schemas
}))
"""


@dataclass(frozen=True)
class Call:
    """One place that calls an operator; `arguments` is None where they cannot be counted."""

    name: str
    file: str
    arguments: int | None


def operators(python: Path) -> dict[str, tuple[int, int]]:
    """The operators an environment's vLLM has, each with the least and the most arguments it takes."""
    command = [str(python), "-c", _LIST_OPERATORS]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = json.loads(found.stdout.strip().splitlines()[-1])
    return {name: (least, most) for name, (least, most) in listed.items()}


def misfits(
    operators: dict[str, tuple[int, int]], before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]]
) -> list[str]:
    """A sentence for each call that cannot work and that the CPU build's own Python does not make.

    Args:
        before: names and texts of the Python files the operators were built for.
        after: those that are to call them.
    """
    made = set(_calls(before))
    found = []
    for call in dict.fromkeys(_calls(after)):
        if call in made or call.name in KNOWN:
            continue
        if call.name not in operators:
            if _is_for_cpu(call):
                found.append(f"{call.file} needs the operator {call.name}, which is not compiled")
            continue
        least, most = operators[call.name]
        if call.arguments is not None and not least <= call.arguments <= most:
            takes = str(most) if least == most else f"{least} to {most}"
            found.append(
                f"{call.file} gives {call.name} {call.arguments} arguments, compiled it takes {takes}"
            )
    return found


def _is_for_cpu(call: Call) -> bool:
    """Whether an operator is one of a CPU's: most others exist with CUDA only, and are called there only."""
    return "cpu" in call.name.split("_") or "cpu" in call.file.lower()


def _calls(files: Iterable[tuple[str, str]]) -> Iterator[Call]:
    for file, text in files:
        if "ops._C." in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and (name := _operator(node.func)):
                    starred = any(isinstance(one, ast.Starred) for one in node.args)
                    starred = starred or any(keyword.arg is None for keyword in node.keywords)
                    yield Call(name, file, None if starred else len(node.args) + len(node.keywords))


def _operator(function: ast.expr) -> str | None:
    """`name` of `torch.ops._C.name`, or of one of its overloads."""
    written = ast.unparse(function)
    prefix = "torch.ops._C."
    return written.removeprefix(prefix).partition(".")[0] if written.startswith(prefix) else None
