# SPDX-License-Identifier: Apache-2.0
"""What a localizer is: image and question in, region and confidence out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from vllm_crop.localizers.heat import HeatMap
from vllm_crop.localizers.thumbnails import Picture
from vllm_crop.planning.geometry import ImageView, Region

LocalizerName = Literal["attention", "engine", "openai"]


class LocalizerError(Exception):
    """The localizer could not be asked, or failed: the image is served whole."""


class UnreadableAnswerError(LocalizerError):
    """What it said is no location."""


@dataclass(frozen=True)
class LocalizerAnswer:
    """What a localizer says.

    Attributes:
        region: in fractions of the image; None for "this question needs the whole image".
        confidence: the probability the localizer gave its own words, in [0, 1], among the legal ones where it
            could say no others; of a heat map how much of the heat the region holds beyond its share of the
            area; None where it is unknown.
        heat: where the model looked, if that is what the region was read from; over what it was shown.
        shows: the part of the image that the heat is over.
        warm: places outside the region that are hot too; in fractions of the image.
    """

    region: Region | None
    confidence: float | None
    heat: HeatMap | None = None
    shows: ImageView | None = None
    warm: Region | None = None


def nothing() -> None:
    """For whoever has nothing to do while others wait."""


class Localizer(Protocol):
    """Finds the region of an image that a question is about.

    Attributes:
        name: as metrics and facts call it.
        version: changes whenever the same image and question could get another answer; part of the key of
            every cache of regions.
    """

    name: LocalizerName
    version: str

    async def locate(
        self,
        picture: Picture,
        question: str,
        salt: str | None = None,
        waiting: Callable[[], None] = nothing,
    ) -> LocalizerAnswer:
        """Find the region.

        Args:
            picture: as the client sent it.
            salt: keeps tenants apart in caches that are shared, as the request's `cache_salt`.
            waiting: called when there is nothing left to do here but wait for the answer.

        Raises:
            LocalizerError: with the reason, for the log.
        """
        ...

    def locate_now(self, picture: Picture, question: str, salt: str | None = None) -> LocalizerAnswer:
        """The same without an event loop, for the offline `LLM`."""
        ...
