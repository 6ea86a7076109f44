# SPDX-License-Identifier: Apache-2.0
"""KServe's resources by the models its Python package generates from the API, read without importing them.

The package needs a web framework and pandas to be imported, and its models leave out keys they do not know:
here such a key is an error. Values are looked at as far as they are strings, numbers, lists and mappings; of
Kubernetes' own parts (containers, volumes) nothing is said.
"""

import ast
import re
import zipfile
from typing import Any

from tests.wheels import wheel

VERSION = "0.21.0"
_SCALARS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


class KServeModels:
    """The classes `V1beta1...` of one release, by name."""

    def __init__(self) -> None:
        with zipfile.ZipFile(wheel("kserve", VERSION)) as package:
            self._sources: dict[str, str] = {}
            for name in package.namelist():
                if re.fullmatch(r"kserve/models/v\w+\.py", name):
                    text = package.read(name).decode()
                    self._sources |= dict.fromkeys(re.findall(r"^class (\w+)\(", text, re.MULTILINE), text)

    def errors(self, resource: dict[str, Any]) -> list[str]:
        """What is wrong with a manifest, each with the place it stands at."""
        version = resource["apiVersion"].rpartition("/")[2]
        return list(
            self._object_errors(f"{version.capitalize()}{resource['kind']}", resource, resource["kind"])
        )

    def _object_errors(self, model: str, value: Any, place: str) -> list[str]:
        if model not in self._sources:
            return []
        if not isinstance(value, dict):
            return [f"{place}: no mapping"]
        types = self._fields(model)
        unknown = [f"{place}.{key}: unknown" for key in value if key not in types]
        return unknown + [
            error
            for key in value
            if key in types
            for error in self._errors(types[key], value[key], f"{place}.{key}")
        ]

    def _errors(self, kind: str, value: Any, place: str) -> list[str]:
        if item := re.fullmatch(r"list\[(.*)\]", kind):
            if not isinstance(value, list):
                return [f"{place}: no list"]
            return [
                error
                for index, one in enumerate(value)
                for error in self._errors(item[1], one, f"{place}[{index}]")
            ]
        if kind in _SCALARS:
            fits = isinstance(value, _SCALARS[kind]) and isinstance(value, bool) == (kind == "bool")
            return [] if fits else [f"{place}: no {kind}"]
        return self._object_errors(kind, value, place)

    def _fields(self, model: str) -> dict[str, str]:
        """The keys of a class as manifests write them, with their types."""
        (found,) = (
            node
            for node in ast.parse(self._sources[model]).body
            if isinstance(node, ast.ClassDef) and node.name == model
        )
        tables = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in found.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        return {key: tables["openapi_types"][name] for name, key in tables["attribute_map"].items()}
