# SPDX-License-Identifier: Apache-2.0
"""How many visual tokens each image of a request may cost, before anything is known of the images.

Three who may say so: the request's `crop.max_tokens`, else OpenAI's `detail` of the image, else the server's
own `max_tokens`; and for older images of a conversation `history`, which is a bound above all of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Detail = Literal["auto", "low", "high", "original"]
BudgetSource = Literal["max_tokens", "detail", "server", "history", "fit"]
MOST_TOKENS = 1 << 20  # of an image: more than any model has


class History(BaseModel):
    """What older images of a conversation may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    keep: int = Field(
        ge=1,
        le=MOST_TOKENS,
        description="Images of so many of the last messages with images are not touched.",
    )
    max_tokens: int = Field(
        ge=0, le=MOST_TOKENS, description="Visual tokens that each image before them may cost; 0 for none."
    )
    stride: int = Field(
        default=4,
        ge=1,
        le=MOST_TOKENS,
        description="How many messages with images become old at once. In between, the conversation's "
        "beginning stays what it is, and the prefix cache holds it.",
    )

    def num_old(self, num_messages: int) -> int:
        """How many of a conversation's messages with images are old.

        It depends on their number alone: a retry or an edit of the text changes nothing.
        """
        return max(0, num_messages - self.keep) // self.stride * self.stride


@dataclass(frozen=True)
class Shown:
    """Where an image stands in its conversation.

    Attributes:
        message: the how-manieth message with images it came with, from 0 on.
        detail: as OpenAI's API has it.
    """

    message: int = 0
    detail: Detail = "auto"


@dataclass(frozen=True)
class ImageBudget:
    """What one image may cost.

    Attributes:
        max_tokens: None for no bound.
        by: who has set it; "detail" without a bound is an image that is wanted whole.
        evenly: no part of the image counts more than another.
        old: whether it came with an earlier message than the last one with images.
    """

    max_tokens: int | None = None
    by: BudgetSource | None = None
    evenly: bool = False
    old: bool = False

    @property
    def whole(self) -> bool:
        """Whether all of the image is wanted."""
        return self.by is not None and self.max_tokens is None

    @property
    def places_count(self) -> bool:
        """Whether it matters where in the image the answer is."""
        return not (self.whole or self.evenly or self.max_tokens == 0)

    def grown_old(self, history: History, in_prompt: bool) -> "ImageBudget":
        """The smaller of two bounds.

        Args:
            in_prompt: whether this bound is about the prompt, as `history` is, and not about an average.
        """
        own = self.max_tokens
        if own is not None and own <= history.max_tokens and (in_prompt or self.by == "detail"):
            return self
        bound = history.max_tokens if own is None else min(own, history.max_tokens)
        return replace(self, max_tokens=bound, by="history")


def image_budgets(
    asked: Sequence[int | None],
    crop_speaks: Sequence[bool],
    shown: Sequence[Shown],
    low_tokens: int,
    default: int | None,
    history: History | None,
    in_prompt: bool = True,
) -> tuple[ImageBudget, ...]:
    """Per image of a request what it may cost.

    Args:
        asked: the request's `crop.max_tokens` for each image.
        crop_speaks: whether the request's `crop` says how an image is pruned: its `detail` counts no more.
        shown: where each stands.
        low_tokens: what an image of detail "low" costs.
        default: the server's bound for images of which nobody says anything.
        history: for older ones; None without any bound.
        in_prompt: whether bounds that are asked for are about the prompt, and not an average over layers.
    """
    num_messages = max((one.message for one in shown), default=-1) + 1
    num_old = history.num_old(num_messages) if history is not None else 0
    budgets = []
    for tokens, speaks, one in zip(asked, crop_speaks, shown, strict=True):
        budget = _own_budget(tokens, speaks, one.detail, low_tokens, default)
        if history is not None and one.message < num_old:
            budget = budget.grown_old(history, in_prompt)
        budgets.append(replace(budget, old=True) if one.message < num_messages - 1 else budget)
    return tuple(budgets)


def _own_budget(
    asked: int | None, crop_speaks: bool, detail: Detail, low_tokens: int, default: int | None
) -> ImageBudget:
    if asked is not None:
        return ImageBudget(asked, "max_tokens")
    if detail != "auto" and not crop_speaks:
        return ImageBudget(low_tokens, "detail", evenly=True) if detail == "low" else ImageBudget(by="detail")
    return ImageBudget() if default is None else ImageBudget(default, "server")
