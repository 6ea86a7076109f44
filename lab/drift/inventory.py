# SPDX-License-Identifier: Apache-2.0
"""What came and went in vLLM as a whole: multimodal architectures, and what must be installed beside it."""

import ast
import email
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lab.drift.names import Names

_REGISTRY, _TABLE = "vllm.model_executor.models.registry", "_MULTIMODAL_MODELS"


@dataclass(frozen=True)
class Change:
    """What was and what is; None where there is nothing."""

    name: str
    old: str | None
    new: str | None


def changed_architectures(old: Names, new: Names) -> list[Change]:
    """Multimodal architectures that are new, gone, or in another file."""
    return _changes(_architectures(old), _architectures(new))


def changed_requirements(old: Names, new: Names) -> list[Change]:
    """What the two wheels must have installed, extras left out; nothing where a folder does not say."""
    if old.vllm.metadata is None or new.vllm.metadata is None:
        return []
    return _changes(_requirements(old.vllm.metadata), _requirements(new.vllm.metadata))


def _changes(old: dict[str, str], new: dict[str, str]) -> list[Change]:
    names = sorted({*old, *new}, key=str.lower)
    return [Change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _architectures(names: Names) -> dict[str, str]:
    table = names.find(_REGISTRY, _TABLE)
    node = table.nodes[-1] if table is not None else None
    if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
        return {}
    found = {}
    for key, value in zip(node.value.keys, node.value.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
            found[str(key.value)] = str(ast.literal_eval(value.elts[0]))
    return found


def _requirements(metadata: str) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    headers = email.message_from_string(metadata)
    if python := headers["Requires-Python"]:
        found["Python"] = [python]
    for line in headers.get_all("Requires-Dist", []):
        wanted = Requirement(line)
        if "extra ==" in str(wanted.marker):
            continue
        marker = f" on {wanted.marker}" if wanted.marker else ""
        found.setdefault(canonicalize_name(wanted.name), []).append(f"{wanted.specifier or 'any'}{marker}")
    return {name: "; ".join(sorted(each)) for name, each in found.items()}
