# SPDX-License-Identifier: Apache-2.0
"""A request's images go through the HF processor while the engine looks for their regions.

What it makes of an image does not depend on the region, and for large pictures it takes as long as a view's
prefill. It is done where vLLM does it too, by its one thread for multimodal data, and only ever spares that
thread the same work later: whatever goes wrong here, goes wrong there and is reported.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from vllm_crop.localizers.thumbnails import image_of

# Images at once whose processed pixels are held until their regions are known; 43 MB for 1344 x 1344.
MOST = 4
_SLOTS = threading.BoundedSemaphore(MOST)


class ImagesAhead:
    """The images of one request; use as a context, which ends when the request has been processed."""

    def __init__(
        self,
        images: Sequence[Any],
        process: Callable[[Sequence[Any]], Any],
        submit: Callable[[Callable[[], None]], Any],
    ) -> None:
        """Describe the work.

        Args:
            images: of the prompt, in order, as vLLM has them.
            process: makes the HF processor's output of them.
            submit: queues work for the thread that processes.
        """
        self._images, self._process, self._submit = images, process, submit
        self._started = self._over = False
        self._made: Any = None

    def __enter__(self) -> "ImagesAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._made = None
        if self._started:
            _SLOTS.release()

    def start(self) -> None:
        """Queue the work, once, of a single image, unless too many others have theirs under way."""
        # Of several images some may be known already, and all would be processed once more.
        if len(self._images) != 1 or self._started or self._over:
            return
        if _SLOTS.acquire(blocking=False):
            self._started = True
            self._submit(self._work)

    def is_of(self, images: Sequence[Any]) -> bool:
        """Whether these decoded images are the ones described, in this order."""
        ours = [image_of(image) for image in self._images]
        return len(images) == len(ours) and all(a is b for a, b in zip(images, ours, strict=True))

    def take(self, count: int) -> Any | None:
        """The output, once, for whoever needs it of `count` images: all or none."""
        if count != len(self._images):
            return None
        made, self._made = self._made, None
        return made

    def _work(self) -> None:
        if self._over:
            return
        try:
            made = self._process(self._images)
        except Exception:
            return
        if not self._over:
            self._made = made
