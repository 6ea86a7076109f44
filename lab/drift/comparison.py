# SPDX-License-Identifier: Apache-2.0
"""What became of one name from one vLLM to the next. Comments, docstrings and formatting do not count."""

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lab.drift.names import Definition, Names
from lab.drift.reliance import Reliance
from lab.drift.scopes import FUNCTIONS
from vllm_crop.compat.points import UpstreamPoint

Verdict = Literal["same", "new", "body changed", "arguments changed", "gone", "not found"]


@dataclass(frozen=True)
class Finding:
    """One name's comparison.

    Attributes:
        verdict: "new" is what the old vLLM does not have; "not found" what neither has: this reading cannot
            follow the name, or ours is wrong.
        detail: of changed arguments the old and the new ones, of a gone name where it may have gone.
        diff: unified, of the body without comments.
        broken: what a registered point expects and no longer gets.
    """

    relied: Reliance
    verdict: Verdict
    detail: tuple[str, ...] = ()
    diff: str = ""
    broken: str | None = None

    @property
    def severity(self) -> int:
        """0: nothing, 1: to be read, 2: breaks."""
        if self.verdict in ("gone", "not found") or self.broken:
            return 2
        return int(self.verdict != "same")


def compare(relied: Reliance, old: Names, new: Names) -> Finding:
    """Compare what a name stands for in two vLLMs."""
    before, after = relied.find(old), relied.find(new)
    if after is None:
        if before is None:
            return Finding(relied, "not found")
        name = relied.places[-1][1]
        return Finding(relied, "gone", tuple(new.elsewhere(name, before.kind)) if name else ())
    broken = next((said for point in relied.points if (said := broken_point(point, after, new))), None)
    if before is None:
        return Finding(relied, "new", broken=broken)
    texts = _text(before), _text(after)
    diff = "" if texts[0] == texts[1] else _diff(before, after, *texts)
    takes = _arguments(before, old), _arguments(after, new)
    if takes[0] != takes[1] or before.kind != after.kind:
        return Finding(relied, "arguments changed", takes, diff, broken)
    return Finding(relied, "body changed" if diff else "same", (), diff, broken)


def broken_point(point: UpstreamPoint, found: Definition, names: Names) -> str | None:
    """What a point expects and does not get: the check of `vllm-crop check`, on the source."""
    function = _callable(found, names)
    if function is None:
        return point.judge(_kind_of_value(found), (), ())
    parameters, required = _parameters(function), _required(function)
    if _is_bound(function) or found.kind == "class":
        parameters, required = parameters[1:], required - {parameters[0]}
    return point.judge(_kind(function), parameters, required, function.args.kwarg is not None)


def _kind(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As start finds it (compat/supported.py)."""
    if any(name.rpartition(".")[2] in ("property", "cached_property") for name in _decorators(node)):
        return "property"
    if not isinstance(node, ast.AsyncFunctionDef):
        return "function"
    inner = [one for statement in node.body for one in _of_this_function(statement)]
    return "async generator" if any(isinstance(one, ast.Yield) for one in inner) else "coroutine"


def _of_this_function(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, (*FUNCTIONS, ast.Lambda)):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _of_this_function(child)


def _kind_of_value(found: Definition) -> str:
    node = found.nodes[-1] if found.nodes else None
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    return "table" if isinstance(value, ast.Dict | ast.DictComp) else found.kind


def _callable(found: Definition, names: Names) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    if found.kind == "class":
        init = names.member(found, "__init__")
        found = init if init is not None else found
    node = found.nodes[-1] if found.nodes else None
    return node if isinstance(node, FUNCTIONS) else None


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Names as `inspect.signature` gives them."""
    arguments = node.args
    return tuple(
        one.arg
        for one in (
            *(*arguments.posonlyargs, *arguments.args),
            *([arguments.vararg] if arguments.vararg else []),
            *arguments.kwonlyargs,
            *([arguments.kwarg] if arguments.kwarg else []),
        )
    )


def _required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Those without a default."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without = positional[: len(positional) - len(arguments.defaults)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {one.arg for one in (*without, *(one for one, default in keywords if default is None))}


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [ast.unparse(one) for one in node.decorator_list]


def _is_bound(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "classmethod" in _decorators(node)


def _arguments(definition: Definition, names: Names) -> str:
    """How something is called: the names and defaults of its arguments, and whether it is awaited."""
    node = _callable(definition, names)
    if node is None:
        return definition.kind
    bare = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(bare, FUNCTIONS)
    for argument in ast.walk(bare.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    how = [one.id for one in node.decorator_list if isinstance(one, ast.Name)]
    bound = [name for name in how if name in ("classmethod", "staticmethod", "property")]
    prefix = [*bound, *(["async"] if isinstance(node, ast.AsyncFunctionDef) else [])]
    return " ".join([*prefix, f"({ast.unparse(bare.args)})"])


def _text(definition: Definition) -> str:
    """Source without comments, docstrings and formatting; of a class what its methods leave."""
    return "\n".join(_plain(node) for node in definition.nodes)


def _plain(node: ast.stmt) -> str:
    copy = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(copy):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner.body = [one for one in inner.body if not _is_docstring(one)] or [ast.Pass()]
    if isinstance(copy, ast.ClassDef):
        copy.body = [one for one in copy.body if not isinstance(one, FUNCTIONS)] or [ast.Pass()]
    if isinstance(node, ast.Assign | ast.AnnAssign) and _sets_self(node):
        return ""  # an attribute that a method sets: that there is one is all that can be read
    return ast.unparse(copy)


def _sets_self(node: ast.Assign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(inner, ast.Attribute) for target in targets for inner in ast.walk(target))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _diff(before: Definition, after: Definition, old: str, new: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), before.full_name, after.full_name, lineterm="", n=2
    )
    return "\n".join(lines)
