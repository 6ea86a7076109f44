# SPDX-License-Identifier: Apache-2.0
"""What a request's parameters and its prompt allow together, once both are known."""

from dataclasses import replace
from typing import Any

from vllm_crop.eviction.markers import UNMARKED, EvictionSettings, Unmarked, image_placeholders
from vllm_crop.frontend.request_context import FACTS, current_request
from vllm_crop.request import BoundedPlaceholders, LengthBound

# Key of the engine's input of a request of the server's own (the localizer's, a shadow check's): its items
# that the engine has not got yet.
SERVERS_OWN = "crop_servers_own"
IN_THE_WAY = ("prompt_logprobs", "prompt_logprob_token_ids")  # sampling parameters


def settle_request(request: Any, prompt: Any, settings: EvictionSettings) -> None:
    """Judge an EngineCoreRequest, leave out evictions that it cannot have, and bound its answer.

    Args:
        prompt: the engine's input it was made of.

    Raises:
        VLLMValidationError: the client has asked for both; answered with HTTP 400.
    """
    placeholders = prompt.get("mm_placeholders") if isinstance(prompt, dict) else None
    if isinstance(placeholders, BoundedPlaceholders) and request.sampling_params is not None:
        _end_within(request, placeholders.bound)
    parameter = _parameter_in_the_way(request)
    if parameter is None or not settings.stages:
        return
    from vllm_crop.eviction.prompt_eviction import read_markers

    placeholders = image_placeholders(request.mm_features or ())
    if read_markers(request.prompt_token_ids or (), placeholders, settings.marker_ids) is None:
        return
    unmarked: Unmarked | None = prompt.get(UNMARKED)
    first_image = min(offset for offset, _ in placeholders)
    ids = unmarked and unmarked.cut(first_image, len(request.prompt_token_ids))
    if ids is None:
        raise evictions_refused(parameter)
    request.prompt_token_ids = ids
    if (context := current_request.get()) is not None:
        stale = {id(facts) for facts in prompt.get(FACTS, ())}
        context.facts[:] = [
            replace(facts, tokens_avg=float(facts.tokens_after_plc)) if id(facts) in stale else facts
            for facts in context.facts
        ]


def _end_within(request: Any, bound: LengthBound) -> None:
    """Have the answer end with the model's last position id, as one does that reaches --max-model-len.

    The length is that of this very request: a beam is asked on with what it has written.
    """
    from vllm.exceptions import VLLMValidationError

    length, params = len(request.prompt_token_ids or ()), request.sampling_params
    if length >= bound.tokens:
        raise VLLMValidationError(
            f"{bound.parameter}: what is left of images keeps its position ids, so that this model has room "
            f"for {bound.tokens} tokens of prompt and answer, and {length} are there already: send fewer "
            "images, or a smaller max_tokens with beams",
            parameter=bound.parameter,
        )
    params.max_tokens = min(params.max_tokens, bound.tokens - length)
    params.min_tokens = min(params.min_tokens, params.max_tokens)


def evictions_refused(parameter: str) -> Any:
    """The VLLMValidationError for a parameter that evictions cannot go with."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(
        f"{parameter}: not possible for a request whose visual tokens are evicted; send crop.method 'plc' or "
        "'off'",
        parameter=parameter,
    )


def _parameter_in_the_way(request: Any) -> str | None:
    for name in IN_THE_WAY:
        if getattr(request.sampling_params, name, None) is not None:
            return name
    return "resumable" if request.resumable else None
