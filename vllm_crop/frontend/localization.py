# SPDX-License-Identifier: Apache-2.0
"""The step before a prompt is expanded: finds the regions of its images, or says why there are none."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from vllm_crop.config import CropConfig
from vllm_crop.frontend.engine_localizer import EngineLocalizer
from vllm_crop.geometry import Box, Region
from vllm_crop.localizers.base import Localizer, LocalizerError, Located, UnreadableAnswerError
from vllm_crop.localizers.decision import Localization, Outcome, settle
from vllm_crop.localizers.openai import OpenAILocalizer
from vllm_crop.localizers.questions import normalised, questions_of
from vllm_crop.localizers.shared import SharedAnswers
from vllm_crop.localizers.thumbnails import as_image, image_key
from vllm_crop.metrics import crop_metrics
from vllm_crop.params import CropParams, is_off
from vllm_crop.vision_geometry import VisionGeometry

LOCALIZERS: dict[str, Callable[[Any, VisionGeometry, CropConfig], Localizer]] = {
    "engine": lambda renderer, geometry, config: EngineLocalizer(renderer, geometry, config.localizer),
    "openai": lambda renderer, geometry, config: OpenAILocalizer(config.localizer),
}
logger = logging.getLogger("vllm.plugins.crop")


@dataclass(frozen=True)
class Sought:
    """An image whose region is sought.

    Attributes:
        image: None where nothing can be looked at: embeddings, or a uuid alone.
        encoded: the bytes it was decoded from, where they are known.
        question: None where there is none.
    """

    image: Image.Image | None
    encoded: bytes | None
    question: str | None

    @property
    def known(self) -> tuple[Image.Image, str]:
        """Image and question, where neither is missing."""
        assert self.image is not None
        assert self.question is not None
        return self.image, self.question


class Localizing:
    """Asks the server's localizer, in time or not at all."""

    def __init__(self, renderer: Any, geometry: VisionGeometry, config: CropConfig) -> None:
        self.config, self.limits = config.localizer, config.limits
        self.model_name: str = renderer.model_config.served_model_name
        self.localizer = LOCALIZERS[self.config.kind](renderer, geometry, config)
        self.answers: SharedAnswers[Located] = SharedAnswers(self.config.cache_entries)
        self._slots = asyncio.Semaphore(self.config.max_running)

    async def localize(self, sought: Sequence[Sought], ask: bool) -> list[Localization]:
        """Per image, side by side.

        Args:
            ask: False for prompts that are only tokenized: what is known is used, and nobody is asked.
        """
        return self._counted(await asyncio.gather(*(self._localize(one, ask) for one in sought)))

    def localize_now(self, sought: Sequence[Sought]) -> list[Localization]:
        """The same for the offline `LLM`: one after the other, without a time limit."""
        return self._counted([self._localize_now(one) for one in sought])

    def _counted(self, localizations: list[Localization]) -> list[Localization]:
        for one in localizations:
            if one.outcome != "not_asked":
                crop_metrics().record_localization(self.model_name, one)
        return localizations

    async def _localize(self, sought: Sought, ask: bool) -> Localization:
        start, cached = time.perf_counter(), False
        try:
            if (missing := _missing(sought)) is not None:
                return self._without(missing, start)
            async with asyncio.timeout(self.config.timeout_s):
                key = await asyncio.to_thread(self._key, sought)
                cached = self.answers.get(key) is not None
                if not (cached or ask):
                    return self._without("not_asked", start)
                located = await self.answers.make(key, partial(self._locate, sought))
        except TimeoutError:
            logger.warning(
                "The localizer took more than %s s: the image is served whole", self.config.timeout_s
            )
            return self._without("timeout", start)
        except Exception as error:
            return self._without(_failure(error), start)
        return self._settled(located, start, cached)

    def _localize_now(self, sought: Sought) -> Localization:
        start = time.perf_counter()
        if (missing := _missing(sought)) is not None:
            return self._without(missing, start)
        key = self._key(sought)
        located = self.answers.get(key)
        cached = located is not None
        try:
            if located is None:
                located = self.localizer.locate_now(*sought.known)
                self.answers.put(key, located)
        except Exception as error:
            return self._without(_failure(error), start)
        return self._settled(located, start, cached)

    async def _locate(self, sought: Sought) -> Located:
        async with self._slots:
            return await self.localizer.locate(*sought.known)

    def _key(self, sought: Sought) -> tuple[str, str, str]:
        image, question = sought.known
        digest = hashlib.blake2b(question.encode(), digest_size=20).hexdigest()
        return image_key(image, sought.encoded), digest, self.localizer.version

    def _settled(self, located: Located, start: float, cached: bool) -> Localization:
        region, outcome = settle(located, self.config)
        if region is not None and len(region.boxes) > self.limits.max_boxes_per_image:
            region = _bounding_box(region)
        done = self._without(outcome, start)
        return replace(done, region=region, confidence=located.confidence, cached=cached)

    def _without(self, outcome: Outcome, start: float) -> Localization:
        return Localization(None, outcome, self.localizer.name, seconds=time.perf_counter() - start)


def images_sought(
    data: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], params: CropParams, config: CropConfig
) -> list[Sought]:
    """The images of a prompt with their questions; empty if the request wants no regions found.

    Args:
        data: the prompt's multimodal data.
        messages: the conversation it was made of; empty for a prompt that came as text or tokens.
    """
    items = data.get("image")
    items = [] if items is None else items if isinstance(items, list | tuple) else [items]
    pinning = params.localize or config.localizer.conversation
    if not items or params.regions is not None or pinning == "off" or is_off(params, config):
        return []
    questions = questions_of(messages, pinning)
    if params.question is not None or len(questions) != len(items):
        # Asked for by name; or a prompt without messages, or images we know no message of.
        questions = [params.question] * len(items)
    return [
        Sought(as_image(item), getattr(item, "original_bytes", None), question and normalised(question))
        for item, question in zip(items, questions, strict=True)
    ]


def _missing(sought: Sought) -> Outcome | None:
    if sought.question is None:
        return "no_question"
    return "no_image" if sought.image is None else None


def _failure(error: Exception) -> Outcome:
    """What an exception counts as; the request goes on with the whole image."""
    if isinstance(error, UnreadableAnswerError):
        logger.warning("The localizer's answer cannot be read: %s", error)
        return "unreadable"
    if isinstance(error, LocalizerError):
        logger.warning("The localizer failed: %s", error)
    else:
        logger.exception("The localizer failed")
    return "error"


def _bounding_box(region: Region) -> Region:
    sides = list(zip(*region.as_lists(), strict=True))
    return Region((Box(min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3])),))
