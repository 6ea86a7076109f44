# SPDX-License-Identifier: Apache-2.0
"""How small a picture a localizer looks at."""

import hashlib
import math
from typing import Any

from PIL import Image

from vllm_crop.vision_geometry import VisionGeometry

_ATTEMPTS = 50  # token counts come in steps: a little smaller each time until they fit


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in another size, RGB; averages where it becomes smaller."""
    smaller = size[0] <= image.width and size[1] <= image.height
    method = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
    return image.convert("RGB").resize(size, method)


def size_for_tokens(
    geometry: VisionGeometry, width: int, height: int, max_tokens: int
) -> tuple[int, int] | None:
    """The largest size of about the same aspect that costs at most `max_tokens` visual tokens.

    None where a smaller image does not cost less.
    """
    full = geometry.grid(width, height).num_tokens
    if full <= max_tokens:
        return width, height
    scale = math.sqrt(max_tokens / full)
    for _ in range(_ATTEMPTS):
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if geometry.grid(*size).num_tokens <= max_tokens:
            return size
        scale *= 0.97
    return None


def image_key(image: Image.Image, encoded: bytes | None = None) -> str:
    """A hash of what an image shows; of its encoded bytes, where they are known."""
    digest = hashlib.blake2b(digest_size=20)
    if encoded is None:
        digest.update(f"{image.mode} {image.size}".encode())
        encoded = image.tobytes()
    digest.update(encoded)
    return digest.hexdigest()


def as_image(item: Any) -> Image.Image | None:
    """The picture of a multimodal item; None where it has none, as with embeddings or a uuid alone."""
    item = getattr(item, "media", item)  # vLLM keeps encoded bytes beside some images
    return item if isinstance(item, Image.Image) else None
