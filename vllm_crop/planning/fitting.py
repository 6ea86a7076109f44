# SPDX-License-Identifier: Apache-2.0
"""How a request's images share too little room: old ones give way first, regions last."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_crop.errors import CropError


class NoRoomError(CropError):
    """The images do not fit, however few tokens each is left with.

    Attributes:
        least: tokens they take at least.
    """

    def __init__(self, least: int, room: int) -> None:
        super().__init__(f"the images take at least {least} visual tokens, and there is room for {room}")
        self.least = least


@dataclass(frozen=True)
class Claim:
    """What an image would like to have.

    Attributes:
        tokens: of the prompt.
        region: how many of them show what the question is about.
        old: whether it came with an earlier message.
    """

    tokens: int
    region: int = 0
    old: bool = False


def share_room(claims: Sequence[Claim], room: int, floor: int) -> list[int]:
    """Tokens for each image that are `room` or fewer in all.

    The images that have most give first, in four steps until it is enough: of what old images show beside
    their regions, of what the newest show there, of the regions of old ones, and of those of the newest.

    Args:
        floor: no image gets less, but for those that claim less.

    Raises:
        NoRoomError: nor is there room with all of them at the floor.
    """
    given = [claim.tokens for claim in claims]
    steps = [(True, True), (False, True), (True, False), (False, False)]
    for old, spares_regions in steps:
        least = [
            claim.tokens
            if claim.old != old
            else min(claim.tokens, max(floor, claim.region if spares_regions else 0))
            for claim in claims
        ]
        least = [min(one, other) for one, other in zip(least, given, strict=True)]
        if sum(given) <= room:
            return given
        given = _levelled(given, least, room)
    if sum(given) > room:
        raise NoRoomError(sum(given), room)
    return given


def _levelled(given: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Bring the largest down to one level, none below its least, so that all fit, or nearly."""
    low, high = 0, max(given, default=0)
    while low < high:  # the highest level that fits
        level = (low + high + 1) // 2
        if sum(_cut(given, least, level)) <= room:
            low = level
        else:
            high = level - 1
    cut = _cut(given, least, low)
    # What whole numbers leave over goes to the first of those that were cut to the level.
    left = room - sum(cut)
    for index, tokens in enumerate(cut):
        if left > 0 and tokens == low and given[index] > tokens:
            cut[index] += 1
            left -= 1
    return cut


def _cut(given: Sequence[int], least: Sequence[int], level: int) -> list[int]:
    return [min(tokens, max(level, floor)) for tokens, floor in zip(given, least, strict=True)]
