# SPDX-License-Identifier: Apache-2.0
"""How a private point of vLLM is described."""

from dataclasses import dataclass


@dataclass(frozen=True)
class UpstreamPoint:
    """A function of vLLM we override, wrap or call, with the leading parameters it must have."""

    module: str
    name: str
    parameters: tuple[str, ...]
    reason: str
