# SPDX-License-Identifier: Apache-2.0
"""What every family's multimodal processor does with a request's `crop`: plan, count, label, cache keys.

Mixed in front of a vLLM multimodal processor (vllm/multimodal/processing/processor.py). The plan is made
here, once; the worker receives it as tensors beside the pixels, so count and rows cannot disagree.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_crop.config import CropConfig
from vllm_crop.eviction.labels import write_labels
from vllm_crop.eviction.settings import EvictionSettings, embed_indices
from vllm_crop.models import plan_fields
from vllm_crop.models.deciding import ImageDecider, ImageDecision
from vllm_crop.params import CropParams, InvalidCropError
from vllm_crop.vision_geometry import VisionGeometry, geometry_from_configs

CROP_KEY = "crop"
DECISIONS = "crop_decisions"  # in the processed prompt, for the renderer, which takes it out


@dataclass(frozen=True)
class CropItems:
    """What a processor call knows of its images.

    Attributes:
        decisions: per image, in item order.
        image_hashes: per image, whatever the region; empty strings for images not to be remembered.
        mm_hashes: cache keys of all items of the request by modality, regions included.
    """

    decisions: tuple[ImageDecision, ...]
    image_hashes: tuple[str, ...]
    mm_hashes: Mapping[str, Sequence[str]]


class CropProcessorMixin(BaseMultiModalProcessor):
    """Overrides for a processor with the modality "image"; see the module docstring."""

    @cached_property
    def crop_config(self) -> CropConfig:
        """The server's settings, which travel in the HF config (see frontend/hf_overrides.py)."""
        return CropConfig.from_mapping(self.info.get_hf_config().crop)

    @cached_property
    def geometry(self) -> VisionGeometry:
        """Grid and view of this checkpoint with this server's processor settings."""
        return geometry_from_configs(self.info.get_hf_config().to_dict(), self.image_processor_settings())

    def image_processor_settings(self) -> dict[str, Any]:
        """The checkpoint's, and what the server was started with over them."""
        image_processor = self.info.get_hf_processor().image_processor
        overrides = self.info.ctx.get_merged_mm_kwargs({})
        return {**image_processor.to_dict(), **overrides, **overrides.get("images_kwargs", {})}

    @cached_property
    def eviction_settings(self) -> EvictionSettings:
        """Layers and label ids, which travel in the HF config too."""
        return EvictionSettings.from_hf_config(self.info.get_hf_config())

    @cached_property
    def _decider(self) -> ImageDecider:
        return ImageDecider(self.info, self.crop_config, self.geometry)

    def decide(
        self, params: CropParams, mm_items: Mapping[str, Any], image_hashes: Sequence[str]
    ) -> tuple[ImageDecision, ...]:
        """Plan every image of a request; see ImageDecider."""
        return self._decider.decide(params, mm_items, image_hashes)

    # Overrides of BaseMultiModalProcessor. `crop` is taken out before every call to super: the HF processor
    # is cached by its kwargs, and must never see ours.

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """As upstream, with the images' decisions beside the result."""
        given, plain = _split(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=plain))
        images = tuple(hashes.get("image", ()))
        with as_validation_error():
            params = CropParams.parse({} if given is None else given)
            decisions = self.decide(params, inputs.mm_data_items, images)
            if plain and any(decision.request.region for decision in decisions):
                raise InvalidCropError(
                    f"crop.regions: not possible beside other mm_processor_kwargs of the request, "
                    f"{sorted(plain)}: they can move the image under the region",
                    "crop.regions",
                )
        if images:
            hashes = {**hashes, "image": self._hashes_with_requests(images, decisions)}
        # Profiling sends one dummy item many times, without `crop`: a key would let the feature cache
        # answer all but the first, and too little memory would be profiled.
        items = CropItems(decisions, images if given is not None else ("",) * len(images), hashes)
        processed = super().apply(
            replace(inputs, hf_processor_mm_kwargs={**plain, CROP_KEY: items}), timing_ctx
        )
        self._label_evicted(processed, decisions)
        processed[DECISIONS] = decisions
        return processed

    def _label_evicted(self, processed: Any, decisions: Sequence[ImageDecision]) -> None:
        settings = self.eviction_settings
        placeholders = processed["mm_placeholders"].get("image", ())
        for decision, placeholder in zip(decisions, placeholders, strict=True):
            if decision.plan is None or not decision.plan.evicts:
                continue
            leaves_at = settings.stages_leaving_at(decision.plan.evicted_from_layer)
            write_labels(
                processed["prompt_token_ids"], embed_indices(placeholder), leaves_at, settings.label_ids
            )

    def _hashes_with_requests(
        self, image_hashes: Sequence[str], decisions: Sequence[ImageDecision]
    ) -> list[str]:
        position_ids = self.crop_config.position_ids
        return [
            plan_fields.hash_with_request(image_hash, decision.request, position_ids)
            for image_hash, decision in zip(image_hashes, decisions, strict=True)
        ]

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        items, _ = _split(inputs.hf_processor_mm_kwargs)
        return super()._get_mm_hashes(inputs) if items is None else items.mm_hashes

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Any:
        items, plain = _split(inputs.hf_processor_mm_kwargs)
        kwargs = super()._get_cache_missing_processor_kwargs(
            replace(inputs, hf_processor_mm_kwargs=plain), mm_is_cached
        )
        if items is None:
            return kwargs
        missing = [index for index, cached in enumerate(mm_is_cached.get("image", ())) if not cached]
        picked = replace(
            items,
            decisions=tuple(items.decisions[index] for index in missing),
            image_hashes=tuple(items.image_hashes[index] for index in missing),
        )
        return {**kwargs, CROP_KEY: picked}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        items, plain = _split(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, plain)
        if items is not None and items.decisions:
            plans = [decision.compression for decision in items.decisions]
            data[plan_fields.ASSIGNMENT] = [plan_fields.assignment(plan) for plan in plans]
            data[plan_fields.POSITIONS] = [plan_fields.positions(plan) for plan in plans]
            data[plan_fields.IMAGE_KEY] = [
                plan_fields.image_key(image_hash) for image_hash in items.image_hashes
            ]
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, plain = _split(hf_processor_mm_kwargs)
        fields = super()._get_mm_fields_config(hf_inputs, plain)
        ours = {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in plan_fields.CROP_FIELDS
        }
        return {**fields, **ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        _, plain = _split(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(
            mm_items=mm_items, hf_processor_mm_kwargs=plain, out_mm_kwargs=out_mm_kwargs
        )
        return [_with_planned_count(update, out_mm_kwargs) for update in updates]


@contextmanager
def as_validation_error() -> Iterator[None]:
    """Turn an InvalidCropError into the exception that every API of vLLM answers with HTTP 400."""
    try:
        yield
    except InvalidCropError as error:
        raise VLLMValidationError(str(error), parameter=error.parameter) from None


def _split(kwargs: Mapping[str, object]) -> tuple[Any, dict[str, object]]:
    plain = dict(kwargs)
    return plain.pop(CROP_KEY, None), plain


def _with_planned_count(update: PromptUpdate, out_mm_kwargs: Any) -> PromptUpdate:
    if update.modality != "image" or not isinstance(update, PromptReplacement):
        return update
    full_replacement = update.replacement

    def planned_replacement(item_idx: int) -> Any:
        full = full_replacement(item_idx) if callable(full_replacement) else full_replacement
        item = out_mm_kwargs["image"][item_idx]
        planned, num_tokens = len(item[plan_fields.POSITIONS].data), len(item[plan_fields.ASSIGNMENT].data)
        if not planned:
            return full
        assert num_tokens == len(full), f"planned for {num_tokens} visual tokens, the image has {len(full)}"
        return full[:planned]

    return replace(update, replacement=planned_replacement)
