# SPDX-License-Identifier: Apache-2.0
"""What this project relies on in vLLM: the registered points, and what its sources say beside them."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lab.drift.names import Definition, Names, dotted_name
from lab.drift.scopes import FUNCTIONS, Imported, imports
from vllm_crop.compat.points import UpstreamPoint

# In the order in which one name's ways are reported: the strictest first.
Way = Literal["point", "patched", "overridden", "inherited", "used", "imported", "named"]
WAYS: tuple[Way, ...] = ("point", "patched", "overridden", "inherited", "used", "imported", "named")

_PATCHED = re.compile(r"^Replaces: (.*)$", re.M)
_PATCHED_IN = re.compile(r"((?:\w+\.\w+, )*\w+\.\w+) \((vllm/[\w/]+)\.py\)")


@dataclass
class Reliance:
    """One name of vLLM's that is relied on.

    Attributes:
        places: module and name; several where our source tries one after the other.
        ways: how, each with the places in our sources.
        point: where it is registered.
    """

    places: tuple[tuple[str, str], ...]
    ways: dict[Way, set[str]] = field(default_factory=dict)
    points: list[UpstreamPoint] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What the report calls it."""
        return " or ".join(f"{module}.{name}" if name else module for module, name in self.places)

    @property
    def way(self) -> Way:
        """The strictest one."""
        return min(self.ways, key=WAYS.index)

    def find(self, names: Names) -> Definition | None:
        """What it stands for in a vLLM."""
        for module, name in self.places:
            if (found := names.find(module, name)) is not None:
                return found
        return None


class Reliances:
    """Collects what is relied on; `old` is the vLLM that our sources are read against, with our sources."""

    def __init__(self, old: Names) -> None:
        self._old = old
        self._found: dict[tuple[tuple[str, str], ...], Reliance] = {}

    def collect(self, points: Iterable[UpstreamPoint]) -> list[Reliance]:
        """Everything, points first."""
        for point in dict.fromkeys(points):
            relied = self._add(((point.module, point.name),), "point", point.reason)
            relied.points.append(point)
        assert self._old.ours is not None
        for module in self._old.ours:
            self._read_module(module)
        return list(self._found.values())

    def _add(self, places: tuple[tuple[str, str], ...], way: Way, where: str) -> Reliance:
        relied = self._found.setdefault(places, Reliance(places))
        relied.ways.setdefault(way, set()).add(where)
        return relied

    def _read_module(self, module: str) -> None:
        tree = self._old.tree(module)
        self._read_patched(module, ast.get_docstring(tree) or "")
        tried = self._read_alternatives(module, tree)
        for node in ast.walk(tree):
            where = f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in tried:
                for _, imported in self._imports(module, node):
                    self._add(((imported.module, imported.name),), "imported", where)
            elif isinstance(node, ast.Attribute):
                self._read_attribute(module, node, where)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._read_string(node.value, where)
            elif isinstance(node, ast.ClassDef):
                self._read_class(module, node)
            elif isinstance(node, FUNCTIONS):
                self._read_arguments(module, node)

    def _imports(self, module: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Imported]]:
        assert self._old.ours is not None
        for bound, imported in imports(node, module, self._old.ours.is_package(module)):
            if imported.module.partition(".")[0] == "vllm":
                yield bound, imported

    def _read_patched(self, module: str, docstring: str) -> None:
        """The line "Replaces: A.b, A.c (vllm/file.py)" of every patch."""
        for line in _PATCHED.findall(docstring):
            for named, file in _PATCHED_IN.findall(line):
                for name in named.split(", "):
                    self._add(((file.replace("/", "."), name),), "patched", module)

    def _read_alternatives(self, module: str, tree: ast.Module) -> set[ast.stmt]:
        """What is imported from one module or, if that fails, from another; returns these statements."""
        read: set[ast.stmt] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Try) or not any(_catches_imports(one) for one in node.handlers):
                continue
            places: dict[str, list[tuple[str, str]]] = {}
            for statement in [*node.body, *(inner for one in node.handlers for inner in one.body)]:
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    read.add(statement)
                    for bound, imported in self._imports(module, statement):
                        places.setdefault(bound, []).append((imported.module, imported.name))
            for tried in places.values():
                self._add(tuple(tried), "imported", f"{module}:{node.lineno}")
        return read

    def _read_attribute(self, module: str, node: ast.Attribute, where: str) -> None:
        """`stock.Model.method` of an imported name, or `import_module("vllm.x").name`."""
        if isinstance(node.value, ast.Call) and (named := _imported_by_call(node.value)) is not None:
            self._add(((named, node.attr),), "used", where)
            return
        dotted = dotted_name(node)
        root, _, rest = (dotted or "").partition(".")
        if not rest:
            return
        found = self._old.find(module, root)
        if found is None or found.module not in self._old.vllm:
            return
        imported = self._import_of(module, root)
        if imported is None:
            return
        place = (imported.module, ".".join(part for part in (imported.name, rest) if part))
        if self._old.find(*place) is not None:
            self._add((place,), "used", where)

    def _import_of(self, module: str, name: str) -> Imported | None:
        for binding in self._old.bindings(module, name):
            if isinstance(binding, Imported):
                return binding
        return None

    def _read_string(self, text: str, where: str) -> None:
        """A name in quotes: "vllm.v1.worker.cpu_worker.CPUWorker"."""
        if not re.fullmatch(r"vllm(\.[A-Za-z_]\w*)+", text):
            return
        parts = text.split(".")
        for at in range(len(parts), 0, -1):
            module, name = ".".join(parts[:at]), ".".join(parts[at:])
            if module in self._old.vllm:
                if self._old.find(module, name) is not None:
                    self._add(((module, name),), "named", where)
                return

    def _read_class(self, module: str, node: ast.ClassDef) -> None:
        """What our classes override in vLLM's, and what they take from them through `self` and `super()`."""
        owner = self._old.find(module, node.name)
        if owner is None or node not in owner.nodes:
            return
        order = self._old.mro(owner)
        for at, ours in enumerate(order):
            if self._is_vllm(ours):
                continue
            below = order[at + 1 :]
            for name, line in _overriding(ours):
                self._add_member(below, name, "overridden", f"{ours.module}:{line}")
            defined = {
                name for one in order if not self._is_vllm(one) for name in self._old.members(one).bound
            }
            for name, line, by_super in _taken(ours):
                if by_super or name not in defined:
                    self._add_member(below if by_super else order, name, "inherited", f"{ours.module}:{line}")

    def _add_member(self, order: Iterable[Definition], name: str, way: Way, where: str) -> None:
        for one in order:
            if self._is_vllm(one) and self._old.member(one, name) is not None:
                self._add(((one.module, f"{one.name}.{name}"),), way, where)
                return

    def _read_arguments(self, module: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Attributes of arguments that are annotated with a class of vLLM's."""
        classes: dict[str, Definition] = {}
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if argument.annotation is None:
                continue
            found = self._old.expression(module, _without_none(argument.annotation))
            if found is not None and found.kind == "class" and self._is_vllm(found):
                classes[argument.arg] = found
        for inner in ast.walk(node) if classes else ():
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                owner = classes.get(inner.value.id)
                if owner is not None:
                    self._add_member([owner], inner.attr, "used", f"{module}:{inner.lineno}")

    def _is_vllm(self, definition: Definition) -> bool:
        return definition.module in self._old.vllm


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        isinstance(one, ast.Name) and one.id.endswith(("ImportError", "NotFoundError")) for one in caught
    )


def _imported_by_call(call: ast.Call) -> str | None:
    name = dotted_name(call.func) or ""
    argument = call.args[0] if call.args else None
    if not name.endswith("import_module") or not isinstance(argument, ast.Constant):
        return None
    module = str(argument.value)
    return module if module.partition(".")[0] == "vllm" else None


def _overriding(ours: Definition) -> Iterator[tuple[str, int]]:
    node = ours.nodes[-1]
    assert isinstance(node, ast.ClassDef)
    for member in node.body:
        if isinstance(member, FUNCTIONS):
            yield member.name, member.lineno


def _taken(ours: Definition) -> Iterator[tuple[str, int, bool]]:
    """Names read from `self`, `cls` or `super()`; the last says whether from `super()`."""
    for node in ast.walk(ours.nodes[-1]):
        if not isinstance(node, ast.Attribute):
            continue
        of = node.value
        if isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super":
            yield node.attr, node.lineno, True
        elif isinstance(of, ast.Name) and of.id in ("self", "cls"):
            yield node.attr, node.lineno, False


def _without_none(annotation: ast.expr) -> ast.expr:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return annotation.left
    return annotation
