# SPDX-License-Identifier: Apache-2.0
"""Keeps an image processor from finishing tiles that nobody will see.

LLaVA-NeXT's and OneVision's (transformers, image_processing_llava_next.py and _llava_onevision.py) cut a
resized picture into tiles, which are views of one tensor, and then normalise, stack and pad them: most of
their time where there are many. What is left out between the two is never made.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local
from typing import Any

_CUTS = "_get_image_patches"  # gives the tile of the whole image first, the others row by row
_MARK = "_vllm_crop_seen_tiles"
_wrapping = Lock()
_asked = local()  # vLLM makes one image processor for all threads


@dataclass
class _Wanted:
    """What is wanted of the next images of one call, and how many have been cut."""

    tiles: Sequence[Sequence[int] | None]
    cut: int = 0


@contextmanager
def only_tiles(image_processor: Any, tiles: Sequence[Sequence[int] | None]) -> Iterator[_Wanted]:
    """Have an image processor go on with some tiles of each image, in this thread and context.

    Args:
        tiles: per image of the call, in its order; None for all of them.

    Yields:
        `cut` says afterwards whether that happened: an image processor may work in other ways.
    """
    _watch(image_processor)
    wanted = _asked.wanted = _Wanted(tiles)
    try:
        yield wanted
    finally:
        _asked.wanted = None


def _watch(image_processor: Any) -> None:
    """Wrap the method of its class, once: what an object holds is printed, saved and copied with it."""
    kind = type(image_processor)
    with _wrapping:
        cut = getattr(kind, _CUTS, None)
        if cut is None or hasattr(cut, _MARK):
            return

        @functools.wraps(cut)
        def cut_and_pick(self: Any, *args: Any, **kwargs: Any) -> Any:
            found, wanted = cut(self, *args, **kwargs), getattr(_asked, "wanted", None)
            if wanted is None:
                return found
            places = wanted.tiles[wanted.cut]
            wanted.cut += 1
            return found if places is None else [found[place] for place in places]

        setattr(cut_and_pick, _MARK, True)
        setattr(kind, _CUTS, cut_and_pick)
