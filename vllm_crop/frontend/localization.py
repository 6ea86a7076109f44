# SPDX-License-Identifier: Apache-2.0
"""The step before a prompt is expanded: finds the regions of its images, or says why there are none."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMClientError
from vllm.multimodal.image import convert_image_mode, normalize_image

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.frontend.attention_localizer import AttentionLocalizer
from vllm_crop.frontend.engine_localizer import EngineLocalizer
from vllm_crop.frontend.metrics import crop_metrics
from vllm_crop.frontend.shared import SharedAnswers
from vllm_crop.localizers.base import (
    Localizer,
    LocalizerAnswer,
    LocalizerError,
    UnreadableAnswerError,
    nothing,
)
from vllm_crop.localizers.decision import Localization, Outcome, settle
from vllm_crop.localizers.failures import CircuitBreaker, ThrottledLog
from vllm_crop.localizers.questions import normalised, questions_of
from vllm_crop.localizers.remote import OpenAILocalizer
from vllm_crop.localizers.thumbnails import Picture, as_picture, off_the_loop
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.planning.image_budgets import ImageBudget
from vllm_crop.request import is_off

LOCALIZERS: dict[str, Callable[[Any, VisionGeometry, CropConfig], Localizer]] = {
    "attention": lambda renderer, geometry, config: AttentionLocalizer(renderer, geometry, config.localizer),
    "engine": lambda renderer, geometry, config: EngineLocalizer(renderer, geometry, config.localizer),
    "openai": lambda renderer, geometry, config: OpenAILocalizer(config.localizer),
}
_WARM_UP_S = 60.0
_GREY = Picture(lambda: Image.new("RGB", (512, 512), "grey"))
logger = logging.getLogger("vllm.plugins.crop")

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class RegionQuery:
    """An image whose region is sought.

    Attributes:
        picture: None where nothing can be looked at: embeddings, or a uuid that nobody knows.
        question: None where there is none.
        salt: the request's `cache_salt`: its answers are its own.
        waiting: called when the localizer has got all it needs and only its answer is missing.
        wanted: whether a region would change anything.
    """

    picture: Picture | None
    question: str | None
    salt: str | None = None
    wanted: bool = True
    waiting: Callable[[], None] = nothing

    @property
    def known(self) -> tuple[Picture, str]:
        """Picture and question, where neither is missing."""
        assert self.picture is not None
        assert self.question is not None
        return self.picture, self.question


class LocalizationService:
    """Asks the server's localizer, in time or not at all."""

    def __init__(self, renderer: Any, geometry: VisionGeometry, config: CropConfig) -> None:
        self.config, self.limits = config.localizer, config.limits
        self.model_name: str = renderer.model_config.served_model_name
        self.localizer = LOCALIZERS[self.config.kind](renderer, geometry, config)
        self.answers: SharedAnswers[LocalizerAnswer] = SharedAnswers(self.config.cache_entries)
        self.breaker = CircuitBreaker(self.config.suspend_after, self.config.suspend_s)
        self.log = ThrottledLog(logger)
        self._slots = asyncio.Semaphore(self.config.max_running)
        crop_metrics().begin_localizations(self.model_name, self.localizer.name)
        self._asking: set[Key] = set()  # those that the localizer is busy with, waiting ones apart

    async def localize(self, sought: Sequence[RegionQuery]) -> list[Localization]:
        """Per image, side by side; as many at once as one request may have."""
        most = self.config.max_images
        share = asyncio.Semaphore(self.config.max_running_per_request)
        # Asked when an answer is needed and not known: what needs none must not use up the one that may try.
        admitted = cache(self.breaker.admits)
        found_out = False
        try:
            results = await asyncio.gather(*(self._localize(one, share, admitted) for one in sought[:most]))
            verdicts = [answered for _, answered in results]
            late = any(found.outcome == "timeout" for found, _ in results)
            found_out = late or any(verdict is not None for verdict in verdicts)
        finally:  # also if the client has gone
            if admitted.cache_info().currsize and not found_out and admitted():
                self.breaker.hand_back()
        self._note(verdicts)
        return [*(found for found, _ in results), *(self._without("too_many") for _ in sought[most:])]

    def localize_now(self, sought: Sequence[RegionQuery]) -> list[Localization]:
        """The same for the offline `LLM`: one after the other, without a time limit."""
        return [self._localize_now(one) for one in sought]

    def record(self, localizations: Sequence[Localization]) -> None:
        """Count what has become of images, once that is settled."""
        for one in localizations:
            if one.outcome == "not_possible":
                self.log.warning(
                    "not_possible",
                    "A region that was found cannot be used, the image is served whole: %s",
                    " ".join(one.reason.split())[:200],
                )
            if one.outcome != "not_asked":
                crop_metrics().record_localization(self.model_name, one)

    async def warm_up(self) -> None:
        """Ask about a grey picture: the first question compiles a grammar and fills caches, for seconds."""
        try:
            async with asyncio.timeout(_WARM_UP_S):
                await self.localizer.locate(_GREY, "What is this?")
        except (TimeoutError, Exception) as error:
            logger.warning("The localizer does not answer yet: %s", _one_line(error))

    async def _localize(
        self, sought: RegionQuery, share: asyncio.Semaphore, admitted: Callable[[], bool]
    ) -> tuple[Localization, bool | None]:
        """One image; and whether the localizer has answered, None if that says nothing about it."""
        start = time.perf_counter()
        if (missing := _missing(sought)) is not None:
            return self._without(missing, start), None
        key: Key | None = None
        try:
            async with asyncio.timeout(self.config.timeout_s):
                key = await off_the_loop(self._key, sought)
                if (known := self.answers.get(key)) is not None:
                    return self._settled(known, start, cached=True), None
                if not admitted():
                    return self._without("suspended", start), None
                # The share is the request's own: others who ask the same do not wait for its other images.
                async with share:
                    located = await self.answers.make(key, partial(self._locate, key, sought))
                return self._settled(located, start, cached=False), True
        except TimeoutError:
            self.log.warning(
                "timeout",
                "The localizer took more than %s s: the image is served whole",
                self.config.timeout_s,
            )
            # Who waited for others says nothing about the localizer.
            return self._without("timeout", start), False if key in self._asking else None
        except Exception as error:
            outcome = self._failure(error)
            return self._without(outcome, start), _says_of_localizer(error)

    def _note(self, answered: Sequence[bool | None]) -> None:
        """One request counts once, however many images it has."""
        if True in answered:
            if self.breaker.succeeded():
                logger.warning("The localizer answers again")
        elif False in answered and self.breaker.failed():
            crop_metrics().record_suspension(self.model_name, self.localizer.name)
            logger.warning(
                "The localizer has failed %d requests in a row: images are served whole, and every %g s one "
                "request asks it again",
                self.breaker.max_failures,
                self.breaker.seconds,
            )

    def _localize_now(self, sought: RegionQuery) -> Localization:
        start = time.perf_counter()
        if (missing := _missing(sought)) is not None:
            return self._without(missing, start)
        try:
            key = self._key(sought)
            located = self.answers.get(key)
            cached = located is not None
            if located is None:
                picture, question = sought.known
                located = self.localizer.locate_now(picture, question, sought.salt)
                self.answers.put(key, located)
            return self._settled(located, start, cached)
        except Exception as error:
            return self._without(self._failure(error), start)

    async def _locate(self, key: Key, sought: RegionQuery) -> LocalizerAnswer:
        async with self._slots:
            self._asking.add(key)
            try:
                picture, question = sought.known
                return await self.localizer.locate(picture, question, sought.salt, sought.waiting)
            finally:
                self._asking.discard(key)

    def _key(self, sought: RegionQuery) -> Key:
        picture, question = sought.known
        digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return picture.key(), digest, self.localizer.version, sought.salt or ""

    def _settled(self, located: LocalizerAnswer, start: float, cached: bool) -> Localization:
        region, outcome = settle(located, self.config)
        if region is not None and len(region.boxes) > self.limits.max_boxes_per_image:
            region = _bounding_box(region)
        unsure = outcome == "low_confidence"
        reason = ""
        if unsure or outcome == "widened":
            name = "whole_below" if unsure else "widen_below"
            least = self.config.least_confidence if unsure else self.config.widen_below
            reason = f"a confidence of {located.confidence:.3f} is less than {name}, {least:g}"
        return replace(
            self._without(outcome, start),
            region=region,
            confidence=located.confidence,
            cached=cached,
            reason=reason,
            heat=located.heat,
            window=located.shows.window if located.shows else None,
            warm=None if region is None else located.warm,
            late=unsure and self.config.when_unsure == "late",
        )

    def _without(self, outcome: Outcome, start: float | None = None) -> Localization:
        seconds = 0.0 if start is None else time.perf_counter() - start
        return Localization(None, outcome, self.localizer.name, seconds=seconds)

    def not_asked(self, sought: Sequence[RegionQuery]) -> list[Localization]:
        """What is said of images of a prompt that nobody will answer."""
        return [self._without("not_asked") for _ in sought]

    def _failure(self, error: Exception) -> Outcome:
        """What an exception counts as; the request goes on with the whole image."""
        outcome: Outcome = "unreadable" if isinstance(error, UnreadableAnswerError) else "error"
        # An image or a question that vLLM refuses; anything else is a mistake, maybe ours.
        expected = isinstance(error, LocalizerError | ValueError | VLLMClientError)
        self.log.warning(
            outcome if expected else "unexpected",
            "The localizer failed (%s): %s",
            outcome,
            _one_line(error),
            traceback=not expected,
        )
        return outcome


def images_sought(
    data: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    params: CropParams,
    config: CropConfig,
    salt: str | None = None,
    by_name: Callable[[int], Picture | None] = lambda index: None,
    budgets: Sequence[ImageBudget] = (),
) -> list[RegionQuery]:
    """The images of a prompt with their questions; empty if the request wants no regions found.

    Args:
        data: the prompt's multimodal data.
        messages: the conversation it was made of; empty for a prompt that came as text or tokens.
        salt: the prompt's `cache_salt`.
        by_name: gives the picture that came as a uuid alone, None if it is not known.
        budgets: what each image may cost; of some no place counts more than another.
    """
    items = data.get("image")
    if not isinstance(items, list | tuple):
        # A single picture; or embeddings of images, how many only vLLM can tell.
        items = [] if as_picture(items) is None else [items]
    pinning = params.localize or config.localizer.conversation
    if not items or params.regions is not None or pinning == "off":
        return []
    if is_off(params, config) and all(budget.max_tokens is None for budget in budgets):
        return []
    questions = questions_of(messages, pinning)
    if params.question is not None or len(questions) != len(items):
        # Asked for by name; or a prompt without messages, or images we know no message of.
        questions = [params.question] * len(items)
    return [
        RegionQuery(
            by_name(index) if item is None else _picture(item),
            question and normalised(question),
            salt,
            wanted=index >= len(budgets) or budgets[index].places_count,
        )
        for index, (item, question) in enumerate(zip(items, questions, strict=True))
    ]


def _picture(item: Any) -> Picture | None:
    """The picture of an item of a prompt, as it will be when it has been parsed."""
    if not isinstance(item, Image.Image):
        return as_picture(item)
    return Picture(cache(lambda: convert_image_mode(normalize_image(item), "RGB")))


def _missing(sought: RegionQuery) -> Outcome | None:
    if not sought.wanted:
        return "not_asked"
    if not sought.question:
        return "no_question"
    return "no_image" if sought.picture is None else None


def _says_of_localizer(error: Exception) -> bool | None:
    """Whether a failure is an answer: True for one that cannot be read, False for none, None for neither."""
    if isinstance(error, UnreadableAnswerError):
        return True
    # What vLLM or we refuse of this image or question says nothing about other requests.
    return None if isinstance(error, ValueError | VLLMClientError) else False


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _bounding_box(region: Region) -> Region:
    sides = list(zip(*region.as_lists(), strict=True))
    return Region((Box(min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3])),))
