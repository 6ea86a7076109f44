# SPDX-License-Identifier: Apache-2.0
"""How small a picture a localizer looks at."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

Made = TypeVar("Made")

# Pictures may be huge, and many may come at once: two at a time are enough to keep the localizer busy.
_WORKERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="crop-thumbnails")

_HUGE = 16_000_000  # pixels; smaller pictures are averaged exactly
_BAND = 2_000_000  # pixels converted at once


async def off_the_loop(work: Callable[..., Made], *args: Any) -> Made:
    """Run work on pictures in one of few threads."""
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, work, *args)


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in another size, RGB; averages where it becomes smaller.

    A huge picture is reduced in bands before it is converted: whole, it would be in memory once more, three
    bytes for each pixel of a picture that may have come as a bit each.
    """
    if image.width * image.height > _HUGE:
        image = _reduced(image, size)
    smaller = size[0] <= image.width and size[1] <= image.height
    method = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
    return _rgb(image).resize(size, method)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already


def not_huge(image: Image.Image) -> Image.Image:
    """The image, or a smaller one of its aspect that is still larger than what any model looks at."""
    scale = math.sqrt(_BAND / (image.width * image.height))
    if image.width * image.height <= _HUGE:
        return image
    return shrink(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in whole fractions of its size, not smaller than twice `size` where it can be, RGB."""
    factors = max(1, image.width // (2 * size[0])), max(1, image.height // (2 * size[1]))
    if factors == (1, 1):
        return image
    columns, rows = (-(-have // factor) for have, factor in zip(image.size, factors, strict=True))
    reduced = Image.new("RGB", (columns, rows))
    lines = max(1, _BAND // (image.width * factors[1])) * factors[1]
    for top in range(0, image.height, lines):
        band = image.crop((0, top, image.width, min(image.height, top + lines)))
        reduced.paste(_rgb(band).reduce(factors), (0, top // factors[1]))
    return reduced


class Picture:
    """A picture as a localizer gets it: known by what it was decoded from, decoded when needed."""

    def __init__(
        self,
        open_item: Callable[[], Any],
        encoded: bytes | None = None,
        decoding: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe a picture.

        Args:
            open_item: gives the decoded picture as the model's own processor gets it: a PIL image, or vLLM's
                MediaWithBytes around one.
            encoded: the bytes it was decoded from, where they are known.
            decoding: settings that the decoded picture depends on too.
        """
        self._open, self._encoded, self._decoding = open_item, encoded, decoding
        self._shrunk: Image.Image | None = None

    def open(self) -> Image.Image:
        """The picture, decoded."""
        return image_of(self._open())

    def open_item(self) -> Any:
        """The picture with the bytes it came as: vLLM's caches know it by them."""
        return self._open()

    def shrunk(self, size: tuple[int, int], opened: Image.Image | None = None) -> Image.Image:
        """What `shrink` makes of it; the last is remembered: localizer and image processor want the same.

        Args:
            opened: what `open` has given, so that it is not decoded again.
        """
        view = self._shrunk
        if view is None or view.size != size:
            view = self._shrunk = shrink(self.open() if opened is None else opened, size)
        return view

    def key(self) -> str:
        """A hash of what it shows."""
        digest = hashlib.sha256()
        if self._encoded is not None:
            digest.update(f"encoded {sorted((self._decoding or {}).items())!r}".encode())
            digest.update(self._encoded)
        else:
            image = self.open()
            palette = image.getpalette() if image.mode in ("P", "PA") else None
            digest.update(f"decoded {image.mode} {image.size} {palette}".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()


def image_of(item: Any) -> Image.Image:
    """The PIL image of what a Picture opens."""
    image: Image.Image = getattr(item, "media", item)
    return image


def as_picture(item: Any) -> Picture | None:
    """The picture of a multimodal item; None where it has none, as with embeddings or a uuid alone.

    vLLM keeps the encoded bytes beside pictures that came over HTTP (MediaWithBytes); offline a picture may
    be an array of `[height, width, channels]` or `[channels, height, width]` bytes.
    """
    image = getattr(item, "media", item)
    if isinstance(image, Image.Image):
        encoded = getattr(item, "original_bytes", None)
        return Picture(lambda: item, encoded, getattr(item, "io_config", None))
    if isinstance(item, np.ndarray) and item.ndim == 3 and item.dtype == np.uint8:
        pixels = item if item.shape[-1] in (1, 3, 4) else np.moveaxis(item, 0, -1)
        if pixels.shape[-1] in (1, 3, 4):
            pixels = pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels)
            decoded = Image.fromarray(pixels)
            return Picture(lambda: decoded)
    return None
