# SPDX-License-Identifier: Apache-2.0
"""Refuses what a request cannot ask for together with eviction: prompt logprobs, and input that goes on.

Why: the last hidden state of an evicted token does not exist, so its prompt logprobs would be made up; and
a resumed prompt would be scheduled without its plan. Sampling parameters and the processed prompt meet here
and nowhere before the engine, online and offline.
Replaces: InputProcessor.process_inputs (vllm/v1/engine/input_processor.py).
Remove when: vLLM lets a model look at a request together with its parameters.
"""

import functools
from typing import Any

from vllm_crop.eviction.settings import EvictionSettings, image_placeholders

REASON = "refuses prompt logprobs and resumable input for requests with evicted tokens"
_MARK = "_vllm_crop_input_processor_patched"


def patch(input_processor: Any) -> None:
    """Wrap the method of the class InputProcessor, once."""
    if hasattr(input_processor, _MARK):
        return
    setattr(input_processor, _MARK, True)
    process_inputs = input_processor.process_inputs

    @functools.wraps(process_inputs)  # its signature is checked again by every engine of this process
    def process_inputs_with_eviction(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        settings = EvictionSettings.from_hf_config(self.model_config.hf_config)
        if settings.stages:
            check_request(request, settings)
        return request

    input_processor.process_inputs = process_inputs_with_eviction


def check_request(request: Any, settings: EvictionSettings) -> None:
    """Judge an EngineCoreRequest.

    Raises:
        VLLMValidationError: answered with HTTP 400.
    """
    parameter = _parameter_in_the_way(request)
    if parameter is None:
        return
    from vllm.exceptions import VLLMValidationError

    from vllm_crop.eviction.prompt_eviction import read_labels

    placeholders = image_placeholders(request.mm_features or ())
    if read_labels(request.prompt_token_ids or (), placeholders, settings.label_ids) is None:
        return
    raise VLLMValidationError(
        f"{parameter}: not possible for a request whose visual tokens are evicted; send crop.method 'plc' or "
        "'off'",
        parameter=parameter,
    )


def _parameter_in_the_way(request: Any) -> str | None:
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(request.sampling_params, name, None) is not None:
            return name
    return "resumable" if request.resumable else None
