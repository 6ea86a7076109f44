# SPDX-License-Identifier: Apache-2.0
"""What every question is asked under: unpruned, unpruned once more, and pruned at each rate."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_crop.planning.budget import Method


@dataclass(frozen=True)
class Condition:
    """One way to ask.

    Attributes:
        crop: the request's field, without what is the question's own.
        prunes: whether the question's own regions go along.
    """

    name: str
    crop: Mapping[str, Any] = field(hash=False)
    prunes: bool = True

    def field_for(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The field `crop` for a question that brings some of its own (regions, whose question)."""
        return {**own, **self.crop} if self.prunes else dict(self.crop)


UNPRUNED = Condition("unpruned", {"method": "off"}, prunes=False)
# A server does not always give the same answer twice, nor in the same time: what is no more than this control
# shows is no effect of pruning.
AGAIN = Condition("unpruned again", {"method": "off"}, prunes=False)


def make_conditions(rates: Sequence[float], method: Method | None, control: bool) -> tuple[Condition, ...]:
    """Unpruned first, then the control, then each rate once; the server's own rate where none is given."""
    chosen: dict[str, Any] = {} if method is None else {"method": method}
    pruned = [
        Condition(f"rate {rate:g}", {**chosen, "pruning_rate": rate}) for rate in dict.fromkeys(rates)
    ] or [Condition("server's rate", chosen)]
    return (UNPRUNED, *([AGAIN] if control else []), *pruned)


def asking_order(conditions: Sequence[Condition], seed: int, index: int) -> list[Condition]:
    """The conditions in another order for every question: who asks first pays for a new picture."""
    order = list(conditions)
    random.Random(f"{seed}:{index}").shuffle(order)
    return order
