# SPDX-License-Identifier: Apache-2.0
"""Finds regions, hands a request's `crop` to the multimodal processor, reports what became of its images.

Subclass of vllm/renderers/hf.py; everything that renders a prompt passes here: chat completions, responses,
messages, completions, batches, tokenization and offline `LLM`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

from vllm.renderers.hf import HfRenderer

from vllm_crop.facts import ImageFacts, Source
from vllm_crop.frontend.engines import OfflineEngine, ServingEngine
from vllm_crop.frontend.localization import Localizing, Sought, images_sought
from vllm_crop.localizers.decision import Localization
from vllm_crop.metrics import crop_metrics
from vllm_crop.models.deciding import ImageDecision
from vllm_crop.models.processing import CROP_KEY, DECISIONS, CropProcessorMixin, as_validation_error
from vllm_crop.params import CropParams, image_requests
from vllm_crop.request_context import current_request

MESSAGES = "crop_messages"  # in a prompt on its way through the renderer


class CropRenderer(HfRenderer):
    """The stock renderer; for models other than ours it does nothing more.

    Attributes:
        engine: what the localizer asks, once there is one.
        chat_template: the server's own, None for the checkpoint's.
    """

    engine: ServingEngine | OfflineEngine | None = None
    chat_template: str | None = None

    @cached_property
    def _localizing(self) -> Localizing | None:
        """None where regions come from clients alone."""
        processor = self.mm_processor
        if not isinstance(processor, CropProcessorMixin) or not processor.crop_config.localizer.localizes:
            return None
        return Localizing(self, processor.geometry, processor.crop_config)

    def attach_engine(self, kind: Callable[[Any], ServingEngine | OfflineEngine], engine: Any) -> None:
        """Told by every engine of its renderer (compat/patches/engine.py)."""
        if self._localizing is not None and self._localizing.config.kind == "engine":
            self.engine = kind(engine)

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

    def process_for_engine(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        """As upstream, for the offline `LLM`."""
        sought, localizations = self._seek(prompt), []
        if sought and self._localizing is not None:
            localizations = self._localizing.localize_now(sought)
        self._hand_over_crop(prompt, localizations)
        engine_input = super().process_for_engine(prompt, arrival_time, **kwargs)
        self._report(engine_input, localizations, **kwargs)
        return engine_input

    async def process_for_engine_async(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        """As upstream, for the API server."""
        sought, localizations = self._seek(prompt), []
        if sought and self._localizing is not None:
            ask = not kwargs.get("skip_mm_cache", False)  # tokenized, not served
            localizations = await self._localizing.localize(sought, ask)
        self._hand_over_crop(prompt, localizations)
        engine_input = await super().process_for_engine_async(prompt, arrival_time, **kwargs)
        self._report(engine_input, localizations, **kwargs)
        return engine_input

    def _seek(self, prompt: Any) -> list[Sought]:
        """The images whose regions are to be found, all of the prompt's or none."""
        messages, context = prompt.pop(MESSAGES, ()), current_request.get()
        if self._localizing is None or (context is not None and context.inner):
            return []
        params = None if context is None else context.params
        with as_validation_error():
            given = (prompt.get("mm_processor_kwargs") or {}).get(CROP_KEY) if params is None else None
            params = params or CropParams.parse({} if given is None else given)
        return images_sought(
            prompt.get("multi_modal_data") or {}, messages, params, self.mm_processor.crop_config
        )

    def _hand_over_crop(self, prompt: Any, localizations: Sequence[Localization]) -> None:
        context = current_request.get()
        if not isinstance(self.mm_processor, CropProcessorMixin):
            return
        params = None if context is None else context.params
        if context is not None:
            context.handed_over = True
        if prompt.get("multi_modal_data"):
            given = dict(prompt.get("mm_processor_kwargs") or {})
            if params is not None or (context is not None and CROP_KEY not in given):
                given[CROP_KEY] = params or CropParams()
            if localizations:
                with as_validation_error():
                    asked = CropParams.parse(given.get(CROP_KEY) or {})
                regions = [one.region for one in localizations]
                given[CROP_KEY] = asked.model_copy(update={"regions": regions})
            prompt["mm_processor_kwargs"] = given
        elif params is not None:
            with as_validation_error():
                image_requests(params, self.mm_processor.crop_config, num_images=0)

    def _report(
        self,
        engine_input: Any,
        localizations: Sequence[Localization],
        skip_mm_cache: bool = False,
        **_: Any,
    ) -> None:
        decisions = engine_input.pop(DECISIONS, ())
        if not decisions:
            return
        placeholders = engine_input["mm_placeholders"]["image"]
        found = localizations or (None,) * len(decisions)
        facts = [
            _image_facts(decision, placeholder.length, self.mm_processor.geometry.num_layers, localization)
            for decision, placeholder, localization in zip(decisions, placeholders, found, strict=True)
        ]
        model_name = None if skip_mm_cache else self.model_config.served_model_name
        if (context := current_request.get()) is not None:
            # vLLM may still refuse the request: the middleware counts what is answered.
            context.facts.extend(facts)
            context.model_name = model_name
        elif model_name is not None:
            crop_metrics().record(model_name, facts)


def _image_facts(
    decision: ImageDecision, num_placeholders: int, num_layers: int, localization: Localization | None
) -> ImageFacts:
    plan = decision.plan
    assert plan is None or plan.num_embeddings == num_placeholders
    region = decision.request.region
    source: Source = "request"
    if decision.request.off:
        source = "off"
    elif region is not None and plan is None and num_placeholders == decision.full_tokens:
        source = "out_of_view"
    elif localization is not None:
        source = localization.localizer
    elif region is None:
        source = "none"
    return ImageFacts(
        tokens=decision.full_tokens,
        tokens_after_plc=num_placeholders,
        tokens_avg=fmean(plan.tokens_per_layer(num_layers)) if plan else float(num_placeholders),
        region=region,
        source=source,
        localization=localization,
    )
