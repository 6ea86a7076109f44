# SPDX-License-Identifier: Apache-2.0
"""What a row says of one private point of vLLM, and what must be true of it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Kind = Literal["function", "coroutine", "async generator", "table"]


@dataclass(frozen=True)
class UpstreamPoint:
    """A function of vLLM we override, wrap or call, or a table of its that we write into.

    Attributes:
        parameters: the leading ones it must have.
        given: later ones that ours give or take by name.
        kind: how it is used: what has become a coroutine answers nothing before it is awaited.
        passes_on: ours takes whatever theirs is given and gives it on, so more of it may be required.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    reason: str
    given: tuple[str, ...] = ()
    kind: Kind = "function"
    passes_on: bool = False

    @property
    def full_name(self) -> str:
        """As an import would have it."""
        return f"{self.module}.{self.name}"

    @property
    def model_module(self) -> str | None:
        """The file of vllm/model_executor/models it is in; None elsewhere, and for what all models share."""
        name = self.module.removeprefix("vllm.model_executor.models.")
        return None if name in (self.module, "config", "interfaces", "registry") else name

    def judge(
        self, kind: str, parameters: tuple[str, ...], required: Collection[str], takes_any: bool = False
    ) -> str | None:
        """What is wrong with what stands under the name, or None.

        Args:
            kind: one of Kind, or what else it is.
            parameters: all of them, without `self` where it is bound.
            required: those of them that have no default.
            takes_any: whether it takes others by name, too.
        """
        if kind != self.kind:
            return f"is {_article(kind)} {kind}, expected {_article(self.kind)} {self.kind}"
        if parameters[: len(self.parameters)] != self.parameters:
            return f"takes {parameters}, expected {self.parameters}"
        if missing := () if takes_any else tuple(name for name in self.given if name not in parameters):
            return f"does not take {missing}"
        known = {*self.parameters, *self.given}
        more = () if self.passes_on else tuple(name for name in parameters if name in {*required} - known)
        return f"requires {more} besides what is given" if more else None


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
