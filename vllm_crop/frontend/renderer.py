# SPDX-License-Identifier: Apache-2.0
"""Finds regions, hands a request's `crop` to the multimodal processor, reports what became of its images.

Subclass of vllm/renderers/hf.py; everything that renders a prompt passes here: chat completions, responses,
messages, completions, batches, tokenization and offline `LLM`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.renderers.hf import HfRenderer

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.errors import CropError
from vllm_crop.frontend.conversation import shown_in
from vllm_crop.frontend.embedded import note_request
from vllm_crop.frontend.localization import LocalizationService, RegionQuery, images_sought
from vllm_crop.frontend.metrics import crop_metrics
from vllm_crop.frontend.own_request import OfflineEngine, ServingEngine
from vllm_crop.frontend.request_context import (
    FACTS,
    ImageFacts,
    RequestContext,
    Source,
    current_request,
    vllm_request,
)
from vllm_crop.frontend.room import images_of, room_of
from vllm_crop.frontend.settling import IN_THE_WAY, evictions_refused
from vllm_crop.frontend.shadow import ShadowChecks
from vllm_crop.frontend.unseen_images import unseen_facts, without_unseen
from vllm_crop.localizers.decision import Localization
from vllm_crop.localizers.thumbnails import Picture, as_picture
from vllm_crop.models.ahead import ImagesAhead
from vllm_crop.models.known_images import KnownImage
from vllm_crop.models.processor import (
    AHEAD_KEY,
    CROP_KEY,
    DECISIONS,
    REQUEST_KEY,
    WAY_KEY,
    CropProcessorMixin,
    as_validation_error,
)
from vllm_crop.models.sent import OnTheWay, newly_sent
from vllm_crop.planner import ImageDecision
from vllm_crop.planning.budget import method_evicts
from vllm_crop.planning.image_budgets import ImageBudget
from vllm_crop.planning.plan import use_compiled
from vllm_crop.request import CropRequest, Found, UnseenImage, image_requests, request_budgets

MESSAGES = "crop_messages"  # in a prompt on its way through the renderer


class CropRenderer(HfRenderer):
    """The stock renderer; for models other than ours it does nothing more.

    Attributes:
        engine: what the localizer asks, once there is one.
        serving_models: the API server's, whose LoRA adapters the localizer may answer with.
        chat_template: the server's own, None for the checkpoint's.
        shadow_checks: None where no request is checked.
    """

    engine: ServingEngine | OfflineEngine | None = None
    serving_models: Any = None
    chat_template: str | None = None
    shadow_checks: ShadowChecks | None = None

    @cached_property
    def _localizing(self) -> LocalizationService | None:
        """None where regions come from clients alone."""
        processor = self.mm_processor
        if not isinstance(processor, CropProcessorMixin) or not processor.crop_config.localizer.localizes:
            return None
        return LocalizationService(self, processor.geometry, processor.crop_config)

    def attach_engine(self, kind: Callable[[Any], ServingEngine | OfflineEngine], engine: Any) -> None:
        """Told by every engine of its renderer (compat/patches/engine.py), once it runs.

        What makes plans is compiled now: before any request is there to wait for it, and after the engine's
        processes have been started, which need nothing of the compiler.
        """
        if isinstance(self.mm_processor, CropProcessorMixin):
            use_compiled()
        if self._localizing is not None and self._localizing.config.kind in ("attention", "engine"):
            self.engine = kind(engine)
        if isinstance(self.mm_processor, CropProcessorMixin) and kind is ServingEngine:
            shadow = self.mm_processor.crop_config.shadow
            self.shadow_checks = ShadowChecks(self, kind(engine), shadow) if shadow.rate else None

    def note_request(self, request: Any) -> None:
        """Told by vLLM's renderer of each request over HTTP (compat/patches/online_renderer.py)."""
        if isinstance(self.mm_processor, CropProcessorMixin):
            note_request(request)

    def shutdown(self) -> None:
        """As upstream, without checks that are under way."""
        if self.shadow_checks is not None:
            self.shadow_checks.stop()
        super().shutdown()

    def warmup(self, chat_params: Any) -> None:
        """As upstream; the parameters are the server's own."""
        self.chat_template = chat_params.chat_template
        super().warmup(chat_params)

    def render_messages(self, messages: Any, params: Any) -> Any:
        """As upstream, for the offline `LLM`; the messages go along, for the localizer."""
        conversation, prompt = super().render_messages(messages, params)
        prompt[MESSAGES] = messages
        return conversation, prompt

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """The same for the API server."""
        conversation, prompt = await super().render_messages_async(messages, params)
        prompt[MESSAGES] = messages
        return conversation, prompt

    async def warm_up_localizer(self, serving_models: Any) -> None:
        """Let the localizer answer once before clients ask; called by the HTTP middleware, never fails."""
        self.serving_models = serving_models
        if self._localizing is not None:
            await self._localizing.warm_up()

    def process_for_engine(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        """As upstream, for the offline `LLM`."""
        messages = prompt.pop(MESSAGES, ())
        if not isinstance(self.mm_processor, CropProcessorMixin):
            return super().process_for_engine(prompt, arrival_time, **kwargs)
        asked, sought = self._look_at(prompt, messages)
        localizations: list[Localization] = []
        if sought and self._localizing is not None:
            self._refuse_before_work(prompt, asked)
            localizations = self._localizing.localize_now(sought)
        way = OnTheWay()
        self._hand_over(prompt, asked, _found(localizations, sought, prompt), way)
        try:
            engine_input = super().process_for_engine(prompt, arrival_time, **kwargs)
        except BaseException:
            way.give_up()
            self._record(localizations)
            raise
        self._report(engine_input, asked, localizations, **kwargs)
        return engine_input

    async def process_for_engine_async(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        """As upstream, for the API server."""
        messages = prompt.pop(MESSAGES, ())
        if not isinstance(self.mm_processor, CropProcessorMixin):
            return await super().process_for_engine_async(prompt, arrival_time, **kwargs)
        asked, sought = self._look_at(prompt, messages)
        with self._ahead(prompt) as ahead:
            return await self._process_async(prompt, arrival_time, asked, sought, ahead, **kwargs)

    async def _process_async(
        self,
        prompt: Any,
        arrival_time: float,
        asked: CropRequest,
        sought: Sequence[RegionQuery],
        ahead: ImagesAhead,
        **kwargs: Any,
    ) -> Any:
        localizations: list[Localization] = []
        if sought and self._localizing is not None:
            # What is only tokenized asks nobody, and learns nothing of what others have asked: vLLM answers
            # /tokenize without an API key.
            context = current_request.get()
            if kwargs.get("skip_mm_cache", False) or (context is not None and context.only_counts):
                localizations = self._localizing.not_asked(sought)
            else:
                sampling = self._refuse_before_work(prompt, asked)
                if context is not None:
                    # Of a batch: while this conversation waits, no other request may find the images of
                    # the ones before it in vLLM's cache: the engine has not got them yet. They go with data.
                    context.forget_unsent()
                if self._will_be_refused(sampling):
                    localizations = self._localizing.not_asked(sought)
                else:
                    sought = [replace(one, waiting=ahead.start) for one in sought]
                    localizations = await self._localizing.localize(sought)
        way = OnTheWay()
        self._hand_over(prompt, asked, _found(localizations, sought, prompt), way, ahead)
        try:
            engine_input = await super().process_for_engine_async(prompt, arrival_time, **kwargs)
        except BaseException:  # refused when it had been processed, or its client has gone, at any point
            way.give_up()
            self._record(localizations)
            raise
        self._report(engine_input, asked, localizations, **kwargs)
        context = current_request.get()
        if self.shadow_checks is not None and context is not None and context.tracked:
            if localizations:
                asked = replace(asked, found=_found(localizations))  # a check keeps no pictures
            self.shadow_checks.consider(prompt, asked, engine_input, context)
        return engine_input

    def _look_at(self, prompt: Any, messages: Sequence[Any]) -> tuple[CropRequest, list[RegionQuery]]:
        """What is asked for, and the images whose regions are to be found, all of the prompt's or none.

        Raises:
            VLLMValidationError: the client asks for what this server does not do; nothing has been done yet.
        """
        settings = prompt.get("mm_processor_kwargs") or {}
        if isinstance(own := settings.get(REQUEST_KEY), CropRequest):
            return own, []  # the localizer's: its image is not localized again
        context = current_request.get()
        config, salt = self.mm_processor.crop_config, prompt.get("cache_salt")
        with as_validation_error():
            params = None if context is None else context.params
            if params is None:
                given = settings.get(CROP_KEY)
                params = CropParams.parse({} if given is None else given)
            data = prompt.get("multi_modal_data") or {}
            places = shown_in(messages)
            num_images = _num_images(data, params, len(places))
            budgets = request_budgets(
                params, config, num_images, places if len(places) == num_images else None
            )
            # Before any localization is paid for, as far as vLLM has not to read the images for it.
            image_requests(params, config, num_images, budgets=budgets)
        if num_images:
            self._refuse_evictions_without_rows(params, budgets)
        in_batch = context is not None and context.in_batch
        shown = hasattr(vllm_request(), "return_token_strs")  # vLLM's requests to /tokenize
        asked = CropRequest(params, salt=salt, unsure=in_batch, budgets=budgets, shown=shown)
        sought = self._sought(prompt, messages, asked, set(settings) - {CROP_KEY})
        if any(budget.max_tokens == 0 for budget in budgets):
            names = self._names(prompt, salt)
            asked, sought = without_unseen(prompt, asked, sought, self.model_config.hf_config, names)
        room = room_of(
            *(prompt, params, config, self.model_config.max_model_len, vllm_request()),
            self.mm_processor.beside_image,
        )
        return replace(asked, room=room), sought

    def _sought(
        self, prompt: Any, messages: Sequence[Any], asked: CropRequest, other_settings: Collection[str]
    ) -> list[RegionQuery]:
        """The images whose regions are to be found, all of the prompt's or none."""
        if self._localizing is None:
            return []
        if other_settings:
            return []  # they can move an image under its region
        params, salt = asked.params, asked.salt
        config, data = self.mm_processor.crop_config, prompt.get("multi_modal_data") or {}
        known, names = self.mm_processor.known_images(self.mm_processor_cache), self._names(prompt, salt)

        def by_name(index: int) -> Picture | None:
            return known.picture_of(names[index]) if known is not None and index in names else None

        return images_sought(data, messages, params, config, salt, by_name, asked.budgets or ())

    def _names(self, prompt: Any, salt: str | None) -> dict[int, KnownImage]:
        """The images of a prompt whose names are known, by their index."""
        known = self.mm_processor.known_images(self.mm_processor_cache)
        uuids = (prompt.get("multi_modal_uuids") or {}).get("image") or ()
        named = enumerate([uuids] if isinstance(uuids, str) else uuids)
        if known is None:
            return {}
        found = {index: known.find(uuid, salt) for index, uuid in named if isinstance(uuid, str)}
        return {index: image for index, image in found.items() if image is not None}

    def _refuse_before_work(self, prompt: Any, asked: CropRequest) -> Any:
        """Refuse a request that vLLM will not serve whatever is found, before its images are looked at.

        Returns:
            Its sampling parameters, None where they are not known.

        Raises:
            VLLMValidationError: vLLM's own for a wrong sampling parameter; or the images find no room, or the
                prompt is longer than the model takes, with the fewest tokens its images can have.
        """
        sampling = self._sampling()
        fewest = self._fewest_tokens(prompt, asked)
        room = asked.room
        if room is not None:
            floor = self.mm_processor.crop_config.fit_floor
            least = sum(min(tokens, floor) if room.prunes else tokens for tokens in fewest)
            with as_validation_error():
                room.check(least, f", with {floor} for each" if room.prunes else room.advice)
        # A prompt that is cut to a length is cut after its images have been expanded.
        cut = getattr(vllm_request(), "truncate_prompt_tokens", None) is not None
        if not cut and (room is None or not room.prunes):
            self._refuse_too_long(prompt, fewest)
        return sampling

    def _sampling(self) -> Any:
        """The request's sampling parameters, None where they are not known.

        Raises:
            VLLMValidationError, ValueError: they are wrong, as vLLM would say after rendering.
        """
        request = vllm_request()
        if getattr(request, "use_beam_search", False) or not hasattr(request, "to_sampling_params"):
            return None
        return request.to_sampling_params(self.model_config.max_model_len, {})

    def _will_be_refused(self, sampling: Any) -> bool:
        """Whether the engine will not take the request's parameters: it need not be localized.

        vLLM says so itself, for a stream after the response has begun.
        """
        if sampling is None:
            return False
        try:
            sampling.verify(self.model_config, None, self.config.structured_outputs_config, self.tokenizer)
        except (ValueError, VLLMClientError):
            return True
        return False

    def _refuse_evictions_without_rows(self, params: CropParams, budgets: Sequence[ImageBudget]) -> None:
        """Refuse evictions asked for beside prompt logprobs, before vLLM's caches know of the images."""
        method = params.method or self.mm_processor.crop_config.method
        # Without a region "plc+ilp" only compresses.
        bounded = method == "ilp" and any(one.by == "max_tokens" and one.max_tokens for one in budgets)
        evicts = method_evicts(method) and (any(params.regions or ()) or bounded)
        if not evicts or (sampling := self._sampling()) is None:
            return
        for name in IN_THE_WAY:
            if getattr(sampling, name, None) is not None:
                raise evictions_refused(name)

    def _refuse_too_long(self, prompt: Any, fewest: Sequence[int]) -> None:
        images, processor = images_of(prompt.get("multi_modal_data") or {}), self.mm_processor
        of_each = processor.beside_image - processor.place_length
        text = len(prompt.get("prompt_token_ids") or ()) + of_each * len(images)
        least, most = text + sum(fewest), self.model_config.max_model_len
        if least >= most:
            raise VLLMValidationError(
                f"Input length (at least {least}) exceeds model's maximum context length ({most})."
            )

    def _fewest_tokens(self, prompt: Any, asked: CropRequest) -> list[int]:
        """What each image of a known size takes in the prompt at least, wherever its region is."""
        processor, params = self.mm_processor, asked.params
        rate = processor.crop_config.pruning_rate if params.pruning_rate is None else params.pruning_rate
        method = params.method or processor.crop_config.method
        budgets, fewest = asked.budgets or (), list[int]()
        for index, image in enumerate(images_of(prompt.get("multi_modal_data") or {})):
            size = getattr(image, "size", None)
            if not isinstance(size, tuple):
                continue
            try:
                tokens = processor.geometry.grid(*size).num_tokens
            except CropError:
                return []  # the image processor says so
            budget = budgets[index] if index < len(budgets) else ImageBudget()
            if budget.max_tokens is not None:
                fewest.append(1)  # what it is then is not known before it is planned
            else:
                fewest.append(
                    tokens if budget.whole else processor.planner.fewest_embeddings(tokens, rate, method)
                )
        return fewest

    def _ahead(self, prompt: Any) -> ImagesAhead:
        """The images of a prompt, to be processed while their regions are sought."""
        if self.mm_processor.crop_config.compression == "foveate":
            # What is processed depends on the regions.
            return ImagesAhead((), self.mm_processor.process_ahead, self._mm_executor.submit)
        data = prompt.get("multi_modal_data") or {}
        return ImagesAhead(images_of(data), self.mm_processor.process_ahead, self._mm_executor.submit)

    def _hand_over(
        self,
        prompt: Any,
        asked: CropRequest,
        found: tuple[Found, ...],
        way: OnTheWay,
        ahead: ImagesAhead | None = None,
    ) -> None:
        """Tell the multimodal processor what is asked for."""
        context = current_request.get()
        if context is not None:
            context.handed_over = True
        if not prompt.get("multi_modal_data"):
            return
        if found:
            asked = replace(asked, found=found)
        given = prompt.get("mm_processor_kwargs") or {}
        others = {name: value for name, value in given.items() if name != CROP_KEY}
        own: dict[str, Any] = (
            {REQUEST_KEY: asked} if ahead is None else {REQUEST_KEY: asked, AHEAD_KEY: ahead}
        )
        # The localizer's own request has brought its way along.
        prompt["mm_processor_kwargs"] = {WAY_KEY: way, **others, **own}

    def _report(
        self,
        engine_input: Any,
        asked: CropRequest,
        localizations: Sequence[Localization],
        skip_mm_cache: bool = False,
        **_: Any,
    ) -> None:
        decisions: Sequence[ImageDecision] = engine_input.pop(DECISIONS, ())
        unseen: Sequence[UnseenImage] = asked.unseen
        if not (decisions or unseen) or not asked.limited:  # the localizer's own counts for nobody
            return
        placeholders = engine_input["mm_placeholders"]["image"] if decisions else ()
        if len(localizations) != len(decisions):
            localizations = ()  # of embeddings that vLLM has taken apart: none of them was looked at
        found = (
            [
                replace(one, region=None, outcome="not_possible", reason=decision.reason)
                if decision.whole == "not_possible"
                else one
                for one, decision in zip(localizations, decisions, strict=True)
            ]
            if localizations
            else [None] * len(decisions)
        )
        self._record([one for one in found if one is not None])
        processor = self.mm_processor
        facts = [
            _image_facts(
                decision,
                placeholder.length - processor.beside_image,
                processor.geometry.num_layers,
                localization,
                processor.crop_config,
            )
            for decision, placeholder, localization in zip(decisions, placeholders, found, strict=True)
        ]
        for image in unseen:  # in the order in which they were sent
            facts.insert(image.index, unseen_facts(image, processor.crop_config, processor.geometry))
        engine_input[FACTS] = facts
        context = current_request.get()
        only_counts = skip_mm_cache or (context is not None and context.only_counts)
        model_name = None if only_counts else self.model_config.served_model_name
        if context is None or not context.tracked:
            if model_name is not None:
                crop_metrics().record(model_name, facts)
            return
        # vLLM may still refuse the request: the middleware counts what is answered.
        context.facts.extend(facts)
        context.model_name = model_name
        if not skip_mm_cache:
            self._note_unsent(engine_input, context)

    def _record(self, localizations: Sequence[Localization]) -> None:
        if self._localizing is not None:
            self._localizing.record(localizations)

    def _note_unsent(self, engine_input: Any, context: RequestContext) -> None:
        """vLLM's cache now takes new items for sent; they are when the request has reached the engine."""
        cache = self.mm_processor_cache
        if cache is not None:
            context.unsent.update(dict.fromkeys(newly_sent(engine_input), cache.invalidate))


def _found(
    localizations: Sequence[Localization], sought: Sequence[RegionQuery] = (), prompt: Any = None
) -> tuple[Found, ...]:
    """What the image processor is told, with the pictures of images that came as such in the prompt."""
    pictures: list[Picture | None] = [None] * len(localizations)
    if prompt is not None and localizations:
        images = images_of(prompt["multi_modal_data"])
        pictures = [None if image is None else one.picture for image, one in zip(images, sought, strict=True)]
    return tuple(
        Found(one.region, one.warm, one.late, picture)
        for one, picture in zip(localizations, pictures, strict=True)
    )


def _num_images(data: Any, params: CropParams, num_shown: int) -> int:
    """How many images a prompt has; where that takes reading embeddings, as many as the request says.

    Args:
        num_shown: images in its messages.
    """
    images = images_of(data)
    if any(image is not None and as_picture(image) is None for image in images):
        lists = [params.regions, params.max_tokens]
        return next((len(each) for each in lists if isinstance(each, list | tuple)), num_shown)
    return len(images)


def _image_facts(
    decision: ImageDecision,
    num_placeholders: int,
    num_layers: int,
    localization: Localization | None,
    config: CropConfig,
) -> ImageFacts:
    plan, request = decision.plan, decision.request
    source: Source = "request"
    if request.off:
        source = "off"
    elif decision.whole == "out_of_view":
        source = "out_of_view"
    elif localization is not None and localization.outcome != "not_asked":
        source = localization.localizer
    elif request.region is None:
        source = "none"
    return ImageFacts(
        # Without a plan nothing was taken away, whatever the request's own settings made of the image.
        tokens=plan.grid.num_tokens if plan else num_placeholders,
        tokens_after_plc=num_placeholders,
        tokens_avg=plan.tokens_avg(num_layers) if plan else float(num_placeholders),
        region=request.region,
        source=source,
        localization=localization,
        request=request,
        pieces=decision.pieces,
        foveation=config.foveation if request.compression == "foveate" else None,
        reason=decision.reason if localization is None else "",
        resampled=plan is not None and plan.compresses and plan.zone is not None,
    )
