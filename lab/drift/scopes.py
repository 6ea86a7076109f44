# SPDX-License-Identifier: Apache-2.0
"""What the names of a module or a class stand for, by what is written there."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Imported:
    """A name that another module defines; `name` is empty for the module itself."""

    module: str
    name: str


Binding = Imported | ast.stmt


@dataclass
class Scope:
    """The names bound in one module or class body, each with every statement that binds it.

    Attributes:
        stars: modules of which every name is taken.
    """

    bound: dict[str, list[Binding]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def bind(self, name: str, binding: Binding) -> None:
        """Add a statement that binds a name."""
        self.bound.setdefault(name, []).append(binding)


def module_scope(tree: ast.Module, module: str, is_package: bool) -> Scope:
    """What a module's names are at run time.

    What is imported for type checkers only counts where the module makes its names up on demand.
    """
    scope, lazy = Scope(), _lazy_names(tree, module, is_package)
    has_getattr = any(isinstance(node, FUNCTIONS) and node.name == "__getattr__" for node in _flat(tree.body))
    for statement in _flat(tree.body):
        _bind(scope, statement, module, is_package)
    for name, binding in lazy.items():
        scope.bound.setdefault(name, [binding])
    if has_getattr:
        late = Scope()
        for statement in _type_checking(tree.body):
            _bind(late, statement, module, is_package)
        for name, bindings in late.bound.items():
            scope.bound.setdefault(name, bindings)
    return scope


def own_scope(tree: ast.Module, module: str, is_package: bool) -> Scope:
    """The same for a module of ours, in which functions import and define classes, too."""
    scope, inner = module_scope(tree, module, is_package), Scope()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef):
            _bind(inner, node, module, is_package)
    for name, bindings in inner.bound.items():
        scope.bound.setdefault(name, bindings)
    return scope


def class_scope(node: ast.ClassDef) -> Scope:
    """The members of a class, those too that its methods set on `self`."""
    scope = Scope()
    for statement in _flat(node.body):
        _bind(scope, statement, "", False)
    for method in (member for member in node.body if isinstance(member, FUNCTIONS)):
        for statement in (found for found in ast.walk(method) if isinstance(found, ast.stmt)):
            for target in _targets(statement):
                if isinstance(target, ast.Attribute) and _is_name(target.value, "self"):
                    scope.bound.setdefault(target.attr, [statement])
    return scope


def imports(
    node: ast.Import | ast.ImportFrom, module: str, is_package: bool
) -> Iterator[tuple[str, Imported]]:
    """Each name an import statement binds, `*` for all."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname:
                yield alias.asname, Imported(alias.name, "")
            else:
                top = alias.name.partition(".")[0]
                yield top, Imported(top, "")
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + is_package]
        base = ".".join([*kept, *([node.module] if node.module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, Imported(base, alias.name)


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body and of its branches, without those for type checkers."""
    for statement in body:
        if isinstance(statement, ast.If):
            if not _is_type_checking(statement.test):
                yield from _flat(statement.body)
            yield from _flat(statement.orelse)
        elif isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _flat(handler.body)
            yield from _flat([*statement.body, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.With):
            yield from _flat(statement.body)
        else:
            yield statement


def _type_checking(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If) and _is_type_checking(statement.test):
            yield from _flat(statement.body)


def _is_type_checking(test: ast.expr) -> bool:
    return _is_name(test, "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _bind(scope: Scope, statement: ast.stmt, module: str, is_package: bool) -> None:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for name, imported in imports(statement, module, is_package):
            if name == "*":
                scope.stars.append(imported.module)
            else:
                scope.bind(name, imported)
    elif isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        scope.bind(statement.name, statement)
    for target in _targets(statement):
        if isinstance(target, ast.Name):
            scope.bind(target.id, statement)


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return [
            inner
            for target in statement.targets
            for inner in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    return [statement.target] if isinstance(statement, ast.AnnAssign | ast.AugAssign) else []


def _lazy_names(tree: ast.Module, module: str, is_package: bool) -> dict[str, Binding]:
    """What a module's `__getattr__` gives: names of a table MODULE_ATTRS, or compared with in its body."""
    found: dict[str, Binding] = {}
    for statement in _flat(tree.body):
        if isinstance(statement, FUNCTIONS) and statement.name == "__getattr__":
            for node in ast.walk(statement):
                if isinstance(node, ast.Compare):
                    for constant in ast.walk(node):
                        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                            found.setdefault(constant.value, statement)
    for statement in _flat(tree.body):
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)):
            continue
        if not any(_is_name(target, "MODULE_ATTRS") for target in statement.targets):
            continue
        for name, place in ast.literal_eval(statement.value).items():
            relative, _, attribute = place.partition(":")
            prefix = module if is_package else module.rpartition(".")[0]
            found[name] = Imported(prefix + relative if relative.startswith(".") else relative, attribute)
    return found
