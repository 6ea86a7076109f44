# SPDX-License-Identifier: Apache-2.0
"""Takes images that may cost nothing out of a prompt before it is expanded, as if they had not been sent."""

from collections.abc import Collection, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_crop.localizers.thumbnails import as_picture, image_of
from vllm_crop.planning.image_budgets import BudgetSource
from vllm_crop.request import UnseenImage


def take_out(prompt: Any, unseen: Sequence[tuple[int, BudgetSource]], hf_config: Any) -> list[UnseenImage]:
    """Remove images from a prompt's token ids and data, in place.

    Args:
        unseen: which, and who wants it.
        hf_config: the model's, which names the ids that stand for an image and frame it.

    Raises:
        VLLMValidationError: the prompt's ids do not say where its images are.
    """
    data = prompt["multi_modal_data"]
    images = data["image"] if isinstance(data["image"], list | tuple) else [data["image"]]
    indices = {index for index, _ in unseen}
    prompt["prompt_token_ids"] = _without(
        prompt.get("prompt_token_ids") or (), indices, len(images), hf_config
    )
    prompt.pop("prompt", None)  # the text they were made of
    data = prompt["multi_modal_data"] = dict(data)
    data["image"] = _others(images, indices)
    uuids = prompt.get("multi_modal_uuids")
    if uuids and isinstance(uuids.get("image"), list | tuple):
        prompt["multi_modal_uuids"] = {**uuids, "image": _others(uuids["image"], indices)}
    if not data["image"]:
        del data["image"]
        if prompt.get("multi_modal_uuids"):
            prompt["multi_modal_uuids"] = {
                name: ids for name, ids in prompt["multi_modal_uuids"].items() if name != "image"
            }
    if not data:
        prompt.pop("multi_modal_data")
        prompt.pop("multi_modal_uuids", None)
    return [UnseenImage(index, _size(images[index]), by) for index, by in unseen]


def _without(
    token_ids: Sequence[int], indices: Collection[int], num_images: int, hf_config: Any
) -> list[int]:
    image = getattr(hf_config, "image_token_id", getattr(hf_config, "image_token_index", None))
    frame = getattr(hf_config, "vision_start_token_id", None), getattr(hf_config, "vision_end_token_id", None)
    places = [place for place, token in enumerate(token_ids) if token == image]
    if len(places) != num_images:
        raise VLLMValidationError(
            f"crop.max_tokens: {len(places)} image placeholder(s) in the prompt of {num_images} image(s): "
            "none can be taken out without knowing where it is",
            parameter="crop.max_tokens",
        )
    gone: set[int] = set()
    for index in indices:
        place = places[index]
        gone.add(place)
        around = place - 1, place + 1
        if place and around[1] < len(token_ids) and tuple(token_ids[one] for one in around) == frame:
            gone.update(around)
    return [token for place, token in enumerate(token_ids) if place not in gone]


def _others(items: Sequence[Any], indices: Collection[int]) -> list[Any]:
    return [item for index, item in enumerate(items) if index not in indices]


def _size(item: Any) -> tuple[int, int] | None:
    if item is None or as_picture(item) is None:
        return None
    size = getattr(image_of(item), "size", None)
    return size if isinstance(size, tuple) else None
