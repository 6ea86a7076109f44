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

    @property
    def model_module(self) -> str | None:
        """The file of vllm/model_executor/models it is in; None elsewhere, and for what all models share."""
        name = self.module.removeprefix("vllm.model_executor.models.")
        return None if name in (self.module, "interfaces") else name
