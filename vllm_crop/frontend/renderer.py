# SPDX-License-Identifier: Apache-2.0
"""Hands a request's `crop` to the multimodal processor and reports what became of its images.

Subclass of vllm/renderers/hf.py; everything that renders a prompt passes here: chat completions, responses,
messages, completions, batches, tokenization and offline `LLM`.
"""

from statistics import fmean
from typing import Any

from vllm.renderers.hf import HfRenderer

from vllm_crop.facts import ImageFacts, Source
from vllm_crop.metrics import crop_metrics
from vllm_crop.models.deciding import ImageDecision
from vllm_crop.models.processing import CROP_KEY, DECISIONS, CropProcessorMixin, as_validation_error
from vllm_crop.params import CropParams, image_requests
from vllm_crop.request_context import current_request


class CropRenderer(HfRenderer):
    """The stock renderer; for models other than ours it does nothing more."""

    def process_for_engine(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        """As upstream, for the offline `LLM`."""
        self._hand_over_crop(prompt)
        engine_input = super().process_for_engine(prompt, arrival_time, **kwargs)
        self._report(engine_input, **kwargs)
        return engine_input

    async def process_for_engine_async(self, prompt: Any, arrival_time: float, **kwargs: Any) -> Any:
        """As upstream, for the API server."""
        self._hand_over_crop(prompt)
        engine_input = await super().process_for_engine_async(prompt, arrival_time, **kwargs)
        self._report(engine_input, **kwargs)
        return engine_input

    def _hand_over_crop(self, prompt: Any) -> None:
        context = current_request.get()
        if context is None or not isinstance(self.mm_processor, CropProcessorMixin):
            return
        context.handed_over = True
        if prompt.get("multi_modal_data"):
            given = dict(prompt.get("mm_processor_kwargs") or {})
            if context.params is not None or CROP_KEY not in given:
                given[CROP_KEY] = context.params or CropParams()
            prompt["mm_processor_kwargs"] = given
        elif context.params is not None:
            with as_validation_error():
                image_requests(context.params, self.mm_processor.crop_config, num_images=0)

    def _report(self, engine_input: Any, skip_mm_cache: bool = False, **_: Any) -> None:
        decisions = engine_input.pop(DECISIONS, ())
        if not decisions:
            return
        placeholders = engine_input["mm_placeholders"]["image"]
        facts = [
            _image_facts(decision, placeholder.length, self.mm_processor.geometry.num_layers)
            for decision, placeholder in zip(decisions, placeholders, strict=True)
        ]
        model_name = None if skip_mm_cache else self.model_config.served_model_name  # tokenized, not served
        if (context := current_request.get()) is not None:
            # vLLM may still refuse the request: the middleware counts what is answered.
            context.facts.extend(facts)
            context.model_name = model_name
        elif model_name is not None:
            crop_metrics().record(model_name, facts)


def _image_facts(decision: ImageDecision, num_placeholders: int, num_layers: int) -> ImageFacts:
    plan = decision.plan
    assert plan is None or plan.num_embeddings == num_placeholders
    source: Source = "request"
    if decision.request.off:
        source = "off"
    elif decision.request.region is None:
        source = "none"
    elif plan is None and num_placeholders == decision.full_tokens:
        source = "out_of_view"
    return ImageFacts(
        tokens=decision.full_tokens,
        tokens_after_plc=num_placeholders,
        tokens_avg=fmean(plan.tokens_per_layer(num_layers)) if plan else float(num_placeholders),
        region=decision.request.region,
        source=source,
    )
