# SPDX-License-Identifier: Apache-2.0
"""How much room a prompt has for its images, beside its text and an answer."""

from dataclasses import replace
from typing import Any

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.request import Room

_ANSWER_TOKENS = 512  # kept for an answer whose length the request does not say
_LENGTHS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def room_of(
    prompt: Any, params: CropParams, config: CropConfig, longest: int, request: Any, beside_image: int = 0
) -> Room | None:
    """What the images of a prompt may take together; None where nothing bounds them but vLLM itself.

    Args:
        prompt: with one id for each image.
        longest: the model's length, `--max-model-len`.
        request: vLLM's object for the request, None where none is known.
        beside_image: tokens of an expanded image that take no embedding.
    """
    prunes = (params.fit or config.fit) == "prune"
    bound = config.limits.max_tokens_per_request
    rooms = [] if bound is None else [Room(bound, bound, prunes)]
    if params.method == "off" or params.pruning_rate == 0:  # the client wants all of all
        prunes = False
        rooms = [replace(room, prunes=False, advice="") for room in rooms]
    data, token_ids = prompt.get("multi_modal_data") or {}, prompt.get("prompt_token_ids")
    # Videos become longer too, and a prompt that is cut to a length is cut after its images have grown.
    cut = getattr(request, "truncate_prompt_tokens", None) is not None
    if prunes and not cut and set(data) == {"image"} and token_ids:
        left = longest - (len(token_ids) + (beside_image - 1) * len(images_of(data)))
        most = max(0, left - 1)  # vLLM takes no prompt that leaves no token for an answer
        aim = max(0, min(most, left - _answer_tokens(request, longest)))
        rooms.append(Room(most, aim, True, "--max-model-len"))
    if not rooms:
        return None
    narrowest = min(rooms, key=lambda room: room.most)
    return replace(narrowest, aim=min(room.aim for room in rooms))


def images_of(data: Any) -> list[Any]:
    """The images of a prompt's multimodal data; a single one need not be in a list."""
    items = data.get("image")
    return [] if items is None else list(items) if isinstance(items, list | tuple) else [items]


def _answer_tokens(request: Any, longest: int) -> int:
    for name in _LENGTHS:
        asked = getattr(request, name, None)
        if isinstance(asked, int):
            return min(asked, longest // 2)
    return min(_ANSWER_TOKENS, longest // 4)
