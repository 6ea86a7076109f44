# SPDX-License-Identifier: Apache-2.0
"""Takes images that may cost nothing out of a prompt before it is expanded, as if they had not been sent."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from vllm.exceptions import VLLMValidationError

from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.frontend.localization import RegionQuery
from vllm_crop.frontend.request_context import ImageFacts
from vllm_crop.frontend.room import images_of
from vllm_crop.localizers.thumbnails import as_picture, image_of
from vllm_crop.models.known_images import KnownImage
from vllm_crop.models.processor import image_token_of
from vllm_crop.planning.image_budgets import BudgetSource
from vllm_crop.request import CropRequest, ImageRequest, UnseenImage

_T = TypeVar("_T")


def without_unseen(
    prompt: Any,
    asked: CropRequest,
    sought: Sequence[RegionQuery],
    hf_config: Any,
    names: Mapping[int, KnownImage],
) -> tuple[CropRequest, list[RegionQuery]]:
    """Take the images out of a prompt, in place, and out of what is asked for.

    Args:
        asked: with the budgets of all images.
        sought: empty, or one for each image.
        hf_config: the model's, which names the ids that stand for an image and frame it.
        names: images that are known by name, by their index: some come without data.

    Raises:
        VLLMValidationError: the prompt's ids do not say where its images are, or they cannot be taken out.
    """
    assert asked.budgets is not None
    gone: dict[int, BudgetSource] = {
        index: budget.by or "server" for index, budget in enumerate(asked.budgets) if budget.max_tokens == 0
    }
    image = image_token_of(hf_config)
    places = [place for place, token in enumerate(prompt.get("prompt_token_ids") or ()) if token == image]
    images = images_of(prompt["multi_modal_data"])
    pictures = all(one is None or as_picture(one) is not None for one in images)
    if not pictures or not len(places) == len(asked.budgets) == len(images):
        if "max_tokens" not in gone.values():  # the server's own wish fails no request
            least = [replace(one, max_tokens=1) if one.max_tokens == 0 else one for one in asked.budgets]
            return replace(asked, budgets=tuple(least)), list(sought)
        if not pictures:
            raise VLLMValidationError(
                "crop.max_tokens: not possible for image embeddings", parameter="crop.max_tokens"
            )
        if image is None:
            raise VLLMValidationError(
                "crop.max_tokens: 0 is not possible with this model, in whose prompts an image is no token "
                "that could be taken out: send 1",
                parameter="crop.max_tokens",
            )
        raise VLLMValidationError(
            f"crop.max_tokens: {len(places)} image placeholder(s) in a prompt of {len(asked.budgets)} "
            "image(s): none can be taken out without knowing where it is",
            parameter="crop.max_tokens",
        )
    sizes = {index: _size(images[index], names.get(index)) for index in gone}
    _take_out(prompt, gone, places, hf_config)
    unseen = [UnseenImage(index, sizes[index], by) for index, by in gone.items()]
    params, updates = asked.params, dict[str, Any]()
    if params.regions is not None:
        updates["regions"] = _others(params.regions, gone)
    if isinstance(params.max_tokens, tuple):
        updates["max_tokens"] = tuple(_others(params.max_tokens, gone))
    left = replace(
        asked,
        params=params.model_copy(update=updates),
        budgets=tuple(_others(asked.budgets, gone)),
        unseen=tuple(unseen),
    )
    return left, _others(sought, gone)


def unseen_facts(image: UnseenImage, config: CropConfig, geometry: VisionGeometry) -> ImageFacts:
    """What the answer says of an image that was taken out."""
    tokens = 0
    if image.size is not None:
        with suppress(CropError):  # a size that no image processor takes
            tokens = geometry.grid(*image.size).num_tokens
    request = ImageRequest(None, config.pruning_rate, config.compression, max_tokens=0, by=image.by)
    return ImageFacts(tokens, 0, 0.0, None, "none", request=request)


def _take_out(prompt: Any, unseen: Mapping[int, BudgetSource], places: Sequence[int], hf_config: Any) -> None:
    token_ids = prompt["prompt_token_ids"]
    data = prompt["multi_modal_data"]
    images = images_of(data)
    prompt["prompt_token_ids"] = _without(token_ids, places, unseen, hf_config)
    prompt.pop("prompt", None)  # the text they were made of
    data = prompt["multi_modal_data"] = dict(data)
    data["image"] = _others(images, unseen)
    uuids = prompt.get("multi_modal_uuids")
    if uuids and isinstance(uuids.get("image"), list | tuple):
        prompt["multi_modal_uuids"] = {**uuids, "image": _others(uuids["image"], unseen)}
    if not data["image"]:
        del data["image"]
        if prompt.get("multi_modal_uuids"):
            prompt["multi_modal_uuids"] = {
                name: ids for name, ids in prompt["multi_modal_uuids"].items() if name != "image"
            }
    if not data:
        prompt.pop("multi_modal_data")
        prompt.pop("multi_modal_uuids", None)


def _without(
    token_ids: Sequence[int], places: Sequence[int], indices: Collection[int], hf_config: Any
) -> list[int]:
    frame = _frame_of(hf_config)
    gone: set[int] = set()
    for index in indices:
        place = places[index]
        gone.add(place)
        around = place - 1, place + 1
        if place and around[1] < len(token_ids) and tuple(token_ids[one] for one in around) == frame:
            gone.update(around)
    return [token for place, token in enumerate(token_ids) if place not in gone]


def _frame_of(hf_config: Any) -> tuple[int | None, int | None]:
    """The ids before and after an image, None without; transformers has two names for them."""
    before, after = (
        getattr(hf_config, f"vision_{end}_token_id", getattr(hf_config, f"image_{end}_token_id", None))
        for end in ("start", "end")
    )
    return before, after


def _others(items: Sequence[_T], indices: Collection[int]) -> list[_T]:
    return [item for index, item in enumerate(items) if index not in indices]


def _size(item: Any, known: KnownImage | None) -> tuple[int, int] | None:
    if item is None:
        return None if known is None else known.size
    if as_picture(item) is None:
        return None
    size = getattr(image_of(item), "size", None)
    return size if isinstance(size, tuple) else None
