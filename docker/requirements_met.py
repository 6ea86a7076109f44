# SPDX-License-Identifier: Apache-2.0
"""Ends a build in which a package that vllm-crop requires is missing or too old.

The image installs it with `--no-deps`, so that none of vLLM's packages is moved, torch least of all: what it
requires, vLLM brings along. `pip check` would also fail for what is not ours.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def unmet(distribution: str) -> Iterator[str]:
    """One sentence for each requirement of an installed distribution that this environment does not meet."""
    for requirement in map(Requirement, requires(distribution) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield f"{distribution} requires {requirement}, which is not installed"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{distribution} requires {requirement}, and {found} is installed"


if __name__ == "__main__":
    sys.exit("\n".join(unmet("vllm-crop")) or None)
