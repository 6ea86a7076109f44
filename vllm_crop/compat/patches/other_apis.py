# SPDX-License-Identifier: Apache-2.0
"""Keeps `crop` in what vLLM turns into chat completions: the messages API, Cohere's chat, tokenization.

Why: where no middleware reads `crop`, it is taken from vLLM's request object. That of the chat completions
API keeps fields it does not know; these drop them, in their models or on the way to a chat completion.
The models of the requests of two of them allow further fields, too.
Replaces: AnthropicServingMessages.to_chat_completion_request (vllm/entrypoints/anthropic/serving.py).
Replaces: CohereServingChatV2.to_chat_completion_request (vllm/entrypoints/cohere/serving.py).
From vLLM 0.33 on TokenizeChatRequest has such a method, too (vllm/entrypoints/serve/tokenize/protocol.py).
Remove when: vLLM hands a renderer the client's own request.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

REASON = "keeps `crop` of the messages API and its like where no middleware has read it"
METHOD = "to_chat_completion_request"
_MARK = "_vllm_crop_requests_kept"


class Conversion(NamedTuple):
    """A method of vLLM's that makes a chat completion's request of another API's.

    Attributes:
        module: vLLM's.
        owner: the class it is a method of.
        parameter: what it calls the other API's request; `self` is one of them.
    """

    module: str
    owner: str
    parameter: str


CONVERSIONS = (
    Conversion("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "anthropic_request"),
    Conversion("vllm.entrypoints.cohere.serving", "CohereServingChatV2", "request"),
    Conversion("vllm.entrypoints.serve.tokenize.protocol", "TokenizeChatRequest", "self"),
)
# Models of requests that drop what they do not know.
MODELS = {
    "vllm.entrypoints.anthropic.protocol": ("AnthropicMessagesRequest", "AnthropicCountTokensRequest"),
    "vllm.entrypoints.cohere.protocol": ("CohereChatV2Request",),
}


def keep_fields(protocol: ModuleType) -> None:
    """Let the models of one of MODELS keep fields they do not know, as the chat completions API's does.

    A FastAPI route holds what its model was when the route was declared.
    """
    for name in MODELS[protocol.__name__]:
        model = getattr(protocol, name)
        if model.model_config.get("extra") != "allow":
            model.model_config["extra"] = "allow"
            model.model_rebuild(force=True)


def patch(conversion: Conversion, module: ModuleType, carry: Callable[[Any, Any], None]) -> None:
    """Wrap one conversion, once.

    Args:
        carry: is given the other API's request and the chat completion's made of it.
    """
    owner = getattr(module, conversion.owner)
    # The versions of vLLM that render the tokenization API's own request have no such method of it.
    if _MARK in vars(owner) or (conversion.parameter == "self" and not hasattr(owner, METHOD)):
        return
    held = vars(owner)[METHOD]
    of_class = isinstance(held, classmethod)
    convert = held.__func__ if of_class else held

    # Its signature is checked again by every engine of this process.
    @functools.wraps(convert)
    def convert_and_keep(bound: Any, *args: Any, **kwargs: Any) -> Any:
        made = convert(bound, *args, **kwargs)
        of_another = kwargs.get(conversion.parameter, args[0] if args else bound)
        carry(of_another, made)
        return made

    setattr(owner, _MARK, True)
    setattr(owner, METHOD, classmethod(convert_and_keep) if of_class else convert_and_keep)
