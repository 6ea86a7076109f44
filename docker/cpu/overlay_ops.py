# SPDX-License-Identifier: Apache-2.0
"""Which calls of a vLLM's Python do not fit the compiled operators of a CPU build."""

import ast
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Differences that are known, and what is not tested because of them.
KNOWN = {"fused_experts_cpu": "quantised experts"}

_LIST_OPERATORS = """
import json, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
print(json.dumps({
    schema.name.removeprefix("_C::"): [
        sum(not argument.has_default_value() for argument in schema.arguments),
        [argument.name for argument in schema.arguments],
    ]
    for schema in torch._C._jit_get_all_schemas()
}))
"""
# Of vLLM's namespaces a CPU build has compiled `_C` alone; those of other platforms are called there only.
_OPERATOR = re.compile(r"torch\.ops\.(_\w*C(?:_\w+)?)\.(\w+)")


@dataclass(frozen=True)
class Call:
    """One place that calls an operator.

    Attributes:
        name: without the namespace `_C`, with any other as in `_moe_C::name`.
        arguments: how many; None where they cannot be counted.
        keywords: those that are given by name.
    """

    name: str
    file: str
    arguments: int | None
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operator:
    """What an operator takes: the names of its arguments, and how many of them it must have."""

    least: int
    names: tuple[str, ...]

    def misfit(self, call: Call) -> str | None:
        """What of a call it does not take."""
        if unknown := [name for name in call.keywords if name not in self.names]:
            return f"{', '.join(unknown)}, compiled it takes {', '.join(self.names)}"
        least, most = self.least, len(self.names)
        if call.arguments is None or least <= call.arguments <= most:
            return None
        return (
            f"{call.arguments} arguments, compiled it takes {most if least == most else f'{least} to {most}'}"
        )


def operators(python: Path) -> dict[str, Operator]:
    """The operators that an environment's vLLM and torch have."""
    command = [str(python), "-c", _LIST_OPERATORS]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = json.loads(found.stdout.strip().splitlines()[-1])
    return {name: Operator(least, tuple(names)) for name, (least, names) in listed.items()}


def misfits(
    operators: Mapping[str, Operator], before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]]
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
        if said := operators[call.name].misfit(call):
            found.append(f"{call.file} gives {call.name} {said}")
    return found


def _is_for_cpu(call: Call) -> bool:
    """Whether an operator is one of a CPU's: most others exist with CUDA only, and are called there only."""
    return "cpu" in call.name.split("_") or "cpu" in call.file.lower()


def _calls(files: Iterable[tuple[str, str]]) -> Iterator[Call]:
    for file, text in files:
        if _OPERATOR.search(text):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and (name := _operator(node.func)):
                    starred = any(isinstance(one, ast.Starred) for one in node.args)
                    starred = starred or any(keyword.arg is None for keyword in node.keywords)
                    keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
                    yield Call(name, file, None if starred else len(node.args) + len(keywords), keywords)


def _operator(function: ast.expr) -> str | None:
    """`name` of `torch.ops._C.name`, or of one of its overloads."""
    found = _OPERATOR.match(ast.unparse(function))
    if found is None:
        return None
    namespace, name = found.groups()
    return name if namespace == "_C" else f"{namespace}::{name}"
