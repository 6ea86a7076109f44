# SPDX-License-Identifier: Apache-2.0
"""Looks at a request once more before it goes to the engine, where its parameters and its prompt first meet.

* Prompt logprobs, and input that goes on, are not possible with evicted tokens: the last hidden state of an
  evicted token does not exist, and a resumed prompt would be scheduled without its plan. Evictions that the
  client asked for are refused; those that the server chose itself are left out.
* A request that is refused here, by us or by vLLM, has not sent what vLLM's processor cache takes for sent:
  the next request with the same image would come without its data.
* The localizer's own answer is constrained from its first token on, also where the server parses reasoning.

Why: nothing before the engine knows both, online and offline.
Replaces: InputProcessor.process_inputs (vllm/v1/engine/input_processor.py).
Remove when: vLLM lets a model look at a request together with its parameters.
"""

import functools
import inspect
from typing import Any

from vllm_crop.eviction.markers import EvictionSettings
from vllm_crop.frontend.request_context import current_request
from vllm_crop.frontend.settling import SERVERS_OWN, settle_request
from vllm_crop.models.sent import enter, newly_sent

REASON = "settles what a request's parameters and its prompt allow together"
_MARK = "_vllm_crop_input_processor_patched"


def patch(input_processor: Any) -> None:
    """Wrap the method of the class InputProcessor, once."""
    if hasattr(input_processor, _MARK):
        return
    process_inputs = input_processor.process_inputs
    setattr(input_processor, _MARK, True)
    names = list(inspect.signature(process_inputs).parameters)
    # Behind self. A server that prunes does not start with a vLLM that has none (compat/points).
    place = names.index("prompt") - 1 if "prompt" in names else 0

    @functools.wraps(process_inputs)  # its signature is checked again by every engine of this process
    def process_inputs_with_crop(self: Any, *args: Any, **kwargs: Any) -> Any:
        hf_config = getattr(getattr(self, "model_config", None), "hf_config", None)
        if not hasattr(hf_config, "crop"):  # a server that does not prune, of whatever vLLM
            return process_inputs(self, *args, **kwargs)
        prompt = kwargs["prompt"] if "prompt" in kwargs else args[place]
        sent = newly_sent(prompt)
        try:
            request = process_inputs(self, *args, **kwargs)
            settle_request(request, prompt, EvictionSettings.from_hf_config(hf_config))
        except Exception:
            if (cache := self.renderer.mm_processor_cache) is not None:
                for mm_hash in sent:
                    cache.invalidate(mm_hash)
            raise
        enter(prompt, self.renderer.mm_processor_cache)
        if (context := current_request.get()) is not None:
            for mm_hash in sent:
                context.unsent.pop(mm_hash, None)
        if isinstance(prompt, dict) and (unsent := prompt.get(SERVERS_OWN)) is not None:
            unsent.clear()
            request.reasoning_ended = True
        return request

    input_processor.process_inputs = process_inputs_with_crop
