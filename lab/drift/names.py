# SPDX-License-Identifier: Apache-2.0
"""Finds what a dotted name stands for, through re-exports, lazy tables, base classes and instances."""

import ast
import functools
import re
from dataclasses import dataclass
from typing import Literal

from lab.drift.scopes import FUNCTIONS, Binding, Imported, Scope, class_scope, module_scope, own_scope
from lab.drift.sources import Sources

Kind = Literal["module", "class", "function", "value"]


@dataclass(frozen=True)
class Definition:
    """What a name stands for, where it is defined.

    Attributes:
        nodes: every statement that binds it: overloads and setters are several; none for a module.
    """

    kind: Kind
    module: str
    name: str
    nodes: tuple[ast.stmt, ...] = ()

    @property
    def full_name(self) -> str:
        """Module and name."""
        return f"{self.module}.{self.name}" if self.name else self.module


class Names:
    """The names of a vLLM, and of our own sources where they are given too."""

    def __init__(self, vllm: Sources, ours: Sources | None = None) -> None:
        self.vllm = vllm
        self.ours = ours
        self._looking: set[tuple[str, str]] = set()

    def find(self, module: str, name: str) -> Definition | None:
        """What a name of a module stands for; the module itself where `name` is empty; None for nothing."""
        if not name:
            return Definition("module", module, "") if self._has(module) else None
        if (module, name) in self._looking:  # modules that import each other
            return None
        self._looking.add((module, name))
        try:
            return self._find(module, name)
        finally:
            self._looking.discard((module, name))

    def expression(self, module: str, node: ast.expr) -> Definition | None:
        """What an expression of a module names; None for what is computed."""
        dotted = dotted_name(node.value if isinstance(node, ast.Subscript) else node)
        return None if dotted is None else self.find(module, dotted)

    @functools.cache  # noqa: B019  # as long-lived as the command
    def mro(self, definition: Definition) -> tuple[Definition, ...]:
        """A class and its bases as far as they are vLLM's or ours, in the order members are looked up."""
        node = definition.nodes[-1]
        if not isinstance(node, ast.ClassDef):
            return ()
        bases = [self.expression(definition.module, base) for base in node.bases]
        found = [definition]
        for base in bases:
            if base is not None and base.kind == "class" and base != definition:
                found += self.mro(base)
        # A base of several classes comes after the last of them.
        return tuple(one for at, one in enumerate(found) if one not in found[at + 1 :])

    def member(self, owner: Definition, name: str) -> Definition | None:
        """A class's member, its own or inherited."""
        for one in self.mro(owner):
            bindings = self.members(one).bound.get(name)
            if bindings:
                return self._defined(one.module, f"{one.name}.{name}", bindings)
        return None

    @functools.cache  # noqa: B019
    def members(self, definition: Definition) -> Scope:
        """What a class's own body defines."""
        node = definition.nodes[-1]
        return class_scope(node) if isinstance(node, ast.ClassDef) else Scope()

    def bindings(self, module: str, name: str) -> list[Binding]:
        """What a module binds to a name, in the order it is written."""
        return self._scope(module).bound.get(name, [])

    @functools.cache  # noqa: B019
    def tree(self, module: str) -> ast.Module:
        """A module's syntax tree."""
        return ast.parse(self._sources(module).text(module), filename=module)

    def elsewhere(self, name: str, kind: Kind) -> list[str]:
        """Where a name that is gone may have gone: full names of that kind that end like it."""
        last = name.rpartition(".")[2]
        pattern = re.compile(
            rf"^\s*(?:async def|def|class) {re.escape(last)}\b|^{re.escape(last)}\b.*=", re.M
        )
        found = []
        for module in self.vllm:
            if pattern.search(self.vllm.text(module)):
                for candidate in self._candidates(module, name):
                    definition = self.find(module, candidate)
                    if definition is not None and definition.kind == kind:
                        found.append(definition.full_name)
        exact = [one for one in found if one.endswith(f".{name}")]
        return list(dict.fromkeys(exact or found))

    def _candidates(self, module: str, name: str) -> list[str]:
        owner, _, last = name.rpartition(".")
        if not owner:
            return [name]
        classes = [node.name for node in self.tree(module).body if isinstance(node, ast.ClassDef)]
        return [f"{one}.{last}" for one in classes] + [last]

    def _find(self, module: str, name: str) -> Definition | None:
        head, _, rest = name.partition(".")
        if not self._has(module):
            return None
        scope = self._scope(module)
        bindings = scope.bound.get(head)
        if bindings is None:
            for star in scope.stars:
                if (found := self.find(star, name)) is not None:
                    return found
            return self.find(f"{module}.{head}", rest)
        last = bindings[-1]
        if isinstance(last, Imported):
            return self._imported(last, rest)
        return self._below(self._defined(module, head, bindings), rest)

    def _imported(self, imported: Imported, rest: str) -> Definition | None:
        name = ".".join(part for part in (imported.name, rest) if part)
        return self.find(imported.module, name)

    def _below(self, definition: Definition | None, rest: str) -> Definition | None:
        if not rest or definition is None:
            return definition
        head, _, rest = rest.partition(".")
        owner = definition
        if definition.kind == "value":
            made = self._class_of(definition)
            if made is None:
                return None
            owner = made
        if owner.kind != "class":
            return None
        return self._below(self.member(owner, head), rest)

    def _class_of(self, value: Definition) -> Definition | None:
        """Of which class an object is that a module makes: `REGISTRY = Registry()`, `platform: Platform`."""
        node = value.nodes[-1]
        made = node.value.func if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) else None
        if isinstance(node, ast.AnnAssign):
            made = node.annotation
        return None if made is None else self.expression(value.module, made)

    def _defined(self, module: str, name: str, bindings: list[Binding]) -> Definition | None:
        statements = tuple(one for one in bindings if isinstance(one, ast.stmt))
        last = statements[-1] if statements else None
        if last is None:
            return None
        if isinstance(last, ast.ClassDef):
            return Definition("class", module, name, (last,))
        if isinstance(last, FUNCTIONS):
            functions = tuple(one for one in statements if isinstance(one, FUNCTIONS))
            return Definition("function", module, name, functions)
        if isinstance(last, ast.Assign) and "." not in name:
            alias = self.expression(module, last.value)
            if alias is not None:
                return alias
        return Definition("value", module, name, (last,))

    def _has(self, module: str) -> bool:
        return module in self.vllm or (self.ours is not None and module in self.ours)

    def _sources(self, module: str) -> Sources:
        return self.ours if self.ours is not None and module in self.ours else self.vllm

    @functools.cache  # noqa: B019
    def _scope(self, module: str) -> Scope:
        sources = self._sources(module)
        make = module_scope if sources is self.vllm else own_scope
        return make(self.tree(module), module, sources.is_package(module))


def dotted_name(node: ast.expr) -> str | None:
    """`a.b.c` as it is written; None for anything else. Forward references in quotes count."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if re.fullmatch(r"\w+(\.\w+)*", node.value) else None
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])
