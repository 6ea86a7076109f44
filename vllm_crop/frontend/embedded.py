# SPDX-License-Identifier: Apache-2.0
"""Requests of servers that use vLLM's serving classes without its HTTP app, and so without our middleware.

Ray Serve's own ingress is one. Nobody has read the field `crop` of such a request, but vLLM's request models
keep fields they do not know: it is honoured or refused here. Its answer has no header with the facts.
"""

from collections.abc import Mapping
from typing import Any

from vllm_crop.crop_params import MISPLACED_IN, CropParams, misplaced
from vllm_crop.frontend.other_requests import say_what_is_dropped
from vllm_crop.frontend.request_context import RequestContext, current_request
from vllm_crop.models.processor import CROP_KEY, as_validation_error


def note_request(request: Any) -> None:
    """Note which request is about to be rendered.

    Args:
        request: vLLM's own object for it.

    Raises:
        VLLMValidationError: nobody has read its field yet, and it is wrong.
    """
    context = current_request.get()
    if context is not None and context.tracked:
        context.request = request
        return
    say_what_is_dropped()
    given = (getattr(request, "model_extra", None) or {}).get(CROP_KEY)
    with as_validation_error():
        for parent in MISPLACED_IN:
            held = getattr(request, parent, None)
            if isinstance(held, Mapping) and held.get(CROP_KEY) is not None:
                raise misplaced(parent)
        params = None if given is None else CropParams.parse(given)
    # A new one for each: a server may answer one request after another in the same task.
    current_request.set(RequestContext(params=params, request=request, tracked=False))
