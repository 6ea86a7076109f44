# SPDX-License-Identifier: Apache-2.0
"""What every family's multimodal processor does with a request's `crop`: plan, count, mark, cache keys.

Mixed in front of a vLLM multimodal processor (vllm/multimodal/processing/processor.py). The plan is made
here, once; the worker receives it as tensors beside the pixels, so count and rows cannot disagree.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams, InvalidCropError
from vllm_crop.eviction.markers import UNMARKED, EvictionSettings, Unmarked, embed_indices, write_markers
from vllm_crop.families.registry import VisionGeometry, geometry_from_configs
from vllm_crop.localizers.thumbnails import Picture, as_picture
from vllm_crop.models.ahead import ImagesAhead
from vllm_crop.models.image_keys import hash_of, image_key
from vllm_crop.models.known_images import KnownImages, RequestImages, identify
from vllm_crop.models.plan_fields import (
    ASSIGNMENT,
    CROP_FIELDS,
    IMAGE_KEY,
    PLACES,
    POSITIONS,
    assignment,
    places,
    positions,
)
from vllm_crop.models.sent import OnTheWay, forgotten_on_failure, newly_sent, withhold
from vllm_crop.planner import ImageDecision, Planner, field_of, is_clients_wish
from vllm_crop.planning.geometry import ImageTokens
from vllm_crop.planning.plan import TokenPlan
from vllm_crop.request import BoundedPlaceholders, CropRequest, LengthBound

# Keys of a request's processor settings: what the client sent, what the renderer makes of it, and what a call
# of the processor tells its own parts. Under the last two, only objects of ours mean anything.
CROP_KEY, REQUEST_KEY, ITEMS_KEY = "crop", "crop_request", "crop_items"
# More objects of ours: what has been made of the images already; and that they may be given up on their way.
AHEAD_KEY, WAY_KEY = "crop_ahead", "crop_way"
_T = TypeVar("_T")
_FIELD_CONFIGS = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in CROP_FIELDS}
DECISIONS = "crop_decisions"  # in the processed prompt, for the renderer, which takes it out


@dataclass(frozen=True)
class CropItems:
    """What a processor call knows of its images.

    Attributes:
        decisions: per image, in item order.
        image_hashes: per image, whatever the region; empty strings for images not to be remembered.
        mm_hashes: cache keys of all items of the request by modality, regions included.
        ahead: what the HF processor has made of the images already.
        pictures: per image what the server found its region in; None for others.
    """

    decisions: tuple[ImageDecision, ...]
    image_hashes: tuple[str, ...]
    mm_hashes: Mapping[str, Sequence[str]]
    ahead: ImagesAhead | None
    pictures: tuple[Picture | None, ...]


class CropProcessorMixin(BaseMultiModalProcessor):
    """Overrides for a processor with the modality "image"; see the module docstring.

    Attributes:
        beside_image: tokens of an image in the prompt that take no embedding.
        place_length: tokens that stand for an image in an unexpanded prompt, at most.
    """

    beside_image: ClassVar[int] = 0
    place_length: ClassVar[int] = 1

    @cached_property
    def crop_config(self) -> CropConfig:
        """The server's settings, which travel in the HF config (see compat/hf_overrides.py)."""
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
        """Layers and marker ids, which travel in the HF config too."""
        return EvictionSettings.from_hf_config(self.info.get_hf_config())

    @cached_property
    def planner(self) -> Planner:
        """Plans this server's images."""
        # The tower's ranks would split a batch by images, and know nothing of their pieces.
        split = self.info.ctx.get_mm_config().mm_encoder_tp_mode == "data"
        sees_small = not split or bool(self.geometry.why_no_regions)  # such images are none in pieces
        return Planner(self.crop_config, self.geometry, sees_small)

    @cached_property
    def positions(self) -> int | None:
        """Position ids in vLLM's rotary table; None where a prompt has no more of them than tokens."""
        if self.crop_config.position_ids != "original":
            return None
        positions: int = self.info.ctx.model_config.hf_text_config.max_position_embeddings
        return positions * self.geometry.rotary_room

    @cached_property
    def _known_images(self) -> WeakKeyDictionary[Any, KnownImages]:
        return WeakKeyDictionary()

    def known_images(self, cache: Any) -> KnownImages | None:
        """The images that came with a name through a cache of vLLM; None without a cache.

        Prompts that are only tokenized have a cache of their own, and so they have names of their own.
        """
        if cache is None:
            return None
        known = self._known_images.get(cache)
        if known is None:
            known = self._known_images[cache] = KnownImages(self.crop_config.limits.named_images_mib << 20)
        return known

    # Overrides of BaseMultiModalProcessor. `crop` is taken out before every call to super: the HF processor
    # is cached by its kwargs, and must never see ours.

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """As upstream, with the images' decisions beside the result."""
        asked, plain = _take(inputs.hf_processor_mm_kwargs, REQUEST_KEY, CropRequest)
        ahead, plain = _take(plain, AHEAD_KEY, ImagesAhead)
        way, plain = _take(plain, WAY_KEY, OnTheWay)
        sent = plain.pop(CROP_KEY, None)
        is_request = asked is not None or sent is not None
        inputs = replace(inputs, hf_processor_mm_kwargs=plain)
        known = self.known_images(inputs.cache)
        with as_validation_error():
            asked = asked or CropRequest(CropParams.parse({} if sent is None else sent))
            images = identify(inputs, super()._get_mm_hashes, known, asked.salt)
            items = inputs.mm_data_items.get("image") or ()
            embeddings = not isinstance(items, ImageProcessorItems)
            decisions = self.planner.plan(asked, images.sizes, embeddings, tuple(plain))
        if isinstance(items, ImageProcessorItems):
            decisions = self._without_impossible_pieces(items, images, decisions)
        if images.by_name and known is not None:
            inputs, decisions = self._with_images_of_names(inputs, images, known, asked, decisions)
        hashes = dict(images.hashes)
        if images.keys:
            hashes["image"] = self._hashes_with_requests(images.keys, decisions)
        # Profiling sends one dummy item many times, without `crop`: a key would let the feature cache
        # answer all but the first, and too little memory would be profiled.
        keys = images.keys if is_request else ("",) * len(images.keys)
        self._refuse_images_without_places(inputs)
        in_pieces = any(decision.pieces for decision in decisions)
        usable = ahead if not in_pieces and self._is_ahead(ahead, inputs) else None
        pictures = tuple(one.picture for one in asked.found or ())
        if len(pictures) != len(decisions):
            pictures = (None,) * len(decisions)  # the planner has nothing for such images either
        known_here = CropItems(decisions, keys, hashes, usable, pictures)
        with forgotten_on_failure(inputs.cache, hashes):
            processed = super().apply(
                replace(inputs, hf_processor_mm_kwargs={**plain, ITEMS_KEY: known_here}), timing_ctx
            )
        if asked.unsure and inputs.cache is not None:
            # Until it is there, others would find in vLLM's cache what the engine has not got.
            withhold(processed, inputs.cache)
        if way is not None and inputs.cache is not None:
            way.note(newly_sent(processed), inputs.cache.invalidate)
        if asked.room is not None:  # embeddings have no size that could be planned with
            with as_validation_error():
                images_in_prompt = processed["mm_placeholders"].get("image", ())
                taken = sum(one.length - self.beside_image for one in images_in_prompt)
                asked.room.check(taken, "; embeddings cannot be pruned" if embeddings else "")
        if known is not None:  # not before: vLLM's cache knows nothing of a request that failed either
            for name, image, data in images.named:
                known.remember(name, asked.salt, image, data)
        processed[DECISIONS] = decisions
        self._bound_length(processed, decisions, asked)
        if not asked.shown and any(one.plan is not None and one.plan.evicts for one in decisions):
            if asked.found is not None or not any(_evicted_by_client(decision) for decision in decisions):
                first = min(one.offset for one in processed["mm_placeholders"]["image"])
                processed[UNMARKED] = Unmarked(tuple(processed["prompt_token_ids"]), first)
            self._mark_evicted(processed, decisions)
        return processed

    def _bound_length(self, processed: Any, decisions: Sequence[ImageDecision], asked: CropRequest) -> None:
        """Say how long prompt and answer may be together, which go on after position ids without tokens.

        No prompt reaches further than it would unpruned: a server-wide bound would have to be for the largest
        image, whatever a request has.
        """
        beyond = [one for one in decisions if one.mrope_position_delta]
        if self.positions is None or not beyond:
            return
        excess = sum(one.mrope_position_delta for one in beyond)
        wishes = [field_of(one.request) for one in beyond if is_clients_wish(one.request, asked)]
        bound = LengthBound(self.positions - excess, wishes[-1] if wishes else "images")
        processed["mm_placeholders"] = BoundedPlaceholders(processed["mm_placeholders"], bound)

    def _refuse_images_without_places(self, inputs: ProcessorInputs) -> None:
        """Refuse a prompt that was cut, or whose template has left images out.

        vLLM finds out when it has processed them, and answers with an internal error.
        """
        images = inputs.mm_data_items.get("image")
        if images is None:
            return
        places = self.num_places(inputs.prompt)
        if places < len(images):
            raise VLLMValidationError(
                f"the prompt has {places} place(s) for {len(images)} image(s): it was cut, or the chat "
                "template leaves images of such a message out"
            )

    def num_places(self, prompt: Sequence[int]) -> int:
        """How many images an unexpanded prompt has places for."""
        return prompt.count(image_token_of(self.info.get_hf_config()))

    def _without_impossible_pieces(
        self, items: ImageProcessorItems, images: RequestImages, decisions: tuple[ImageDecision, ...]
    ) -> tuple[ImageDecision, ...]:
        """Images of kinds that cannot be cut are seen whole."""

        def possible(index: int) -> bool:
            if index in images.by_name:
                return self.can_be_foveated(images.by_name[index].is_picture)
            image = items.get(index)
            return image is None or self.can_be_foveated(as_picture(image) is not None)

        return tuple(
            replace(decision, pieces=()) if decision.pieces and not possible(index) else decision
            for index, decision in enumerate(decisions)
        )

    def _is_ahead(self, ahead: ImagesAhead | None, inputs: ProcessorInputs) -> bool:
        """Whether the HF processor was given exactly this request's data, with no settings of its own."""
        if ahead is None or inputs.hf_processor_mm_kwargs or set(inputs.mm_data_items) != {"image"}:
            return False
        images = inputs.mm_data_items["image"]
        return ahead.is_of([images.get(index) for index in range(len(images))])

    def _with_images_of_names(
        self,
        inputs: ProcessorInputs,
        images: RequestImages,
        known: KnownImages,
        asked: CropRequest,
        decisions: tuple[ImageDecision, ...],
    ) -> tuple[ProcessorInputs, tuple[ImageDecision, ...]]:
        """Supply images that came as a name alone and that vLLM's cache does not have with this region."""
        cache: Any = inputs.cache
        items = inputs.mm_data_items["image"]
        data = [items.get(index) for index in range(len(items))]
        settled, decoded = list(decisions), dict[str, Any]()
        for index, image in images.by_name.items():
            decision = decisions[index]
            (image_hash,) = self._hashes_with_requests([image.key], [decision])
            if cache.is_cached_item(image_hash):
                continue
            if image.key not in decoded:
                decoded[image.key] = known.data_of(image)
            data[index] = decoded[image.key]
            servers_own = not is_clients_wish(decision.request, asked)
            if data[index] is None and servers_own and cache.is_cached_item(image.key):
                # Only the whole image is left: what the server found must not make it a miss.
                settled[index] = ImageDecision(
                    decision.request.without_budget(),
                    whole="not_possible",
                    reason="of an image that came as a name alone only the whole is left",
                )
        supplied = self.info.parse_mm_data({"image": data}, validate=False)
        return replace(
            inputs, mm_data_items=MultiModalDataItems({**inputs.mm_data_items, **supplied})
        ), tuple(settled)

    def _mark_evicted(self, processed: Any, decisions: Sequence[ImageDecision]) -> None:
        settings = self.eviction_settings
        placeholders = processed["mm_placeholders"].get("image", ())
        for decision, placeholder in zip(decisions, placeholders, strict=True):
            if decision.plan is None or not decision.plan.evicts:
                continue
            leaves_at = settings.stages_leaving_at(decision.plan.evicted_from_layer)
            write_markers(
                processed["prompt_token_ids"], embed_indices(placeholder), leaves_at, settings.marker_ids
            )

    def _hashes_with_requests(
        self, image_hashes: Sequence[str], decisions: Sequence[ImageDecision]
    ) -> list[str]:
        config = self.crop_config
        settings = config.position_ids, config.foveation.unseen_tiles, config.resampler.fingerprint
        return [
            hash_of(image_hash, self.plan_for_encoder(decision), decision, settings)
            for image_hash, decision in zip(image_hashes, decisions, strict=True)
        ]

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        items, _ = _take(inputs.hf_processor_mm_kwargs, ITEMS_KEY, CropItems)
        return super()._get_mm_hashes(inputs) if items is None else items.mm_hashes

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Any:
        items, plain = _take(inputs.hf_processor_mm_kwargs, ITEMS_KEY, CropItems)
        kwargs = super()._get_cache_missing_processor_kwargs(
            replace(inputs, hf_processor_mm_kwargs=plain), mm_is_cached
        )
        if items is None:
            return kwargs
        missing = [index for index, cached in enumerate(mm_is_cached.get("image", ())) if not cached]
        if len(missing) == len(items.decisions):
            return {**kwargs, ITEMS_KEY: items}
        picked = replace(
            items,
            decisions=tuple(items.decisions[index] for index in missing),
            image_hashes=tuple(items.image_hashes[index] for index in missing),
            pictures=tuple(items.pictures[index] for index in missing),
        )
        return {**kwargs, ITEMS_KEY: picked}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        items, plain = _take(hf_kwargs, ITEMS_KEY, CropItems)
        data = None
        if items is not None and items.ahead is not None:
            data = items.ahead.take(len(mm_items.get("image") or ()))
        if items is None or not items.decisions:
            return self.stock_processed(mm_items, plain) if data is None else data
        if data is None:
            data = self.images_processed(mm_items, plain, items)
        plans = [self.plan_for_encoder(decision) for decision in items.decisions]
        data[ASSIGNMENT] = [assignment(plan) for plan in plans]
        data[POSITIONS] = [positions(plan) for plan in plans]
        if self.crop_config.compression == "resampler":
            data[PLACES] = [places(plan) for plan in plans]
        if IMAGE_KEY not in data:
            data[IMAGE_KEY] = [image_key(image_hash) for image_hash in items.image_hashes]
        return data

    def can_be_foveated(self, is_picture: bool) -> bool:
        """Whether the model can be given pieces of an image, a picture or a tensor of pixels."""
        return False

    def images_processed(self, mm_items: Any, hf_kwargs: Mapping[str, object], items: CropItems) -> Any:
        """What the model gets of some items, as `_apply_hf_processor_main`."""
        return self.stock_processed(mm_items, hf_kwargs)

    def stock_processed(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        """What the HF processor makes of some items."""
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)

    def stock_hashes(self, inputs: ProcessorInputs) -> Any:
        """vLLM's own names of items."""
        return super()._get_mm_hashes(inputs)

    def process_ahead(self, images: Sequence[Any]) -> Any:
        """What the HF processor makes of the images of a request that has no settings of its own."""
        items = self.info.parse_mm_data({"image": list(images)}, validate=False)
        return self.stock_processed(items, {})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, plain = _take(hf_processor_mm_kwargs, ITEMS_KEY, CropItems)
        fields = super()._get_mm_fields_config(hf_inputs, plain)
        return {**fields, **_FIELD_CONFIGS}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        _, plain = _take(hf_processor_mm_kwargs, ITEMS_KEY, CropItems)
        updates = super()._get_prompt_updates(
            mm_items=mm_items, hf_processor_mm_kwargs=plain, out_mm_kwargs=out_mm_kwargs
        )
        return [self._with_planned_count(update, out_mm_kwargs) for update in updates]

    def plan_for_encoder(self, decision: ImageDecision) -> TokenPlan | None:
        """What the encoder is to do with an image; None if its embeddings are those of stock vLLM."""
        return decision.compression

    def unpruned_assignment(self, grid: ImageTokens) -> NDArray[np.int32] | None:
        """Of an unpruned image each token's embedding, -1 for text, `[num_tokens]`; None for one each."""
        return None

    def planned_prompt(self, full: PromptUpdateDetails, planned: int, num_tokens: int) -> PromptUpdateDetails:
        """What stands for an image in the prompt, with the planned number of embeddings.

        Args:
            full: what stands for it unpruned, with `num_tokens` that take an embedding.
        """
        ids, is_embed = full.full, full.is_embed
        takes = range(len(ids)) if is_embed is None else is_embed(ids).nonzero()[:, 0].tolist()
        assert num_tokens == len(takes), f"planned for {num_tokens} visual tokens, the image has {len(takes)}"
        if is_embed is None:
            return replace(full, full=ids[:planned])
        gone = set(takes[planned:])
        return replace(full, full=[token for place, token in enumerate(ids) if place not in gone])

    def _with_planned_count(self, update: PromptUpdate, out_mm_kwargs: Any) -> PromptUpdate:
        if update.modality != "image" or not isinstance(update, PromptReplacement):
            return update
        full_replacement = update.replacement

        def planned_replacement(item_idx: int) -> Any:
            full = full_replacement(item_idx) if callable(full_replacement) else full_replacement
            item = out_mm_kwargs["image"][item_idx]
            planned, num_tokens = len(item[POSITIONS].data), len(item[ASSIGNMENT].data)
            if not planned:
                return full
            framed = full if isinstance(full, PromptUpdateDetails) else PromptUpdateDetails(full)
            return self.planned_prompt(framed, planned, num_tokens)

        return replace(update, replacement=planned_replacement)


def image_token_of(hf_config: Any) -> int | None:
    """The id that stands for an image in an unexpanded prompt; transformers has two names for it.

    None of a model in whose prompts an image is text, of any tokens.
    """
    found: int | None = getattr(hf_config, "image_token_id", None)
    return found or getattr(hf_config, "image_token_index", None)


@contextmanager
def as_validation_error() -> Iterator[None]:
    """Turn an InvalidCropError into the exception that every API of vLLM answers with HTTP 400."""
    try:
        yield
    except InvalidCropError as error:
        raise VLLMValidationError(str(error), parameter=error.parameter) from None


def _evicted_by_client(decision: ImageDecision) -> bool:
    """Whether the client itself has asked for what becomes of an image, and that is an eviction."""
    return decision.plan is not None and decision.plan.evicts and decision.request.by in (None, "max_tokens")


def _take(kwargs: Mapping[str, object], key: str, kind: type[_T]) -> tuple[_T | None, dict[str, object]]:
    """An object of ours under a key, and the other settings."""
    others = dict(kwargs)
    found = others.get(key)
    if not isinstance(found, kind):
        return None, others
    del others[key]
    return found, others
