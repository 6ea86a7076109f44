# SPDX-License-Identifier: Apache-2.0
"""What the HTTP middleware and the renderer tell each other about the request being served."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_crop.facts import ImageFacts
from vllm_crop.params import CropParams, CropRequest

# Keys of the engine's input, on its way from the multimodal processor to the engine.
FACTS = "crop_facts"  # what the renderer says of its images
UNLABELLED = "crop_unlabelled"  # the prompt's ids without the evictions that the server chose itself


@dataclass
class RequestContext:
    """One HTTP request, or one of the localizer's own.

    Attributes:
        params: its `crop` field, None if absent.
        handed_over: whether a renderer took notice of `params`.
        facts: what became of the request's images.
        model_name: label to count the facts under once the request is accepted; None leaves them uncounted.
        adapters: the server's loaded LoRA adapters by name.
        inner: what is asked for the image of the localizer's own request; None for requests of clients.
        only_counts: whether the route counts tokens and answers nothing.
        request: vLLM's own object for the request, with its sampling parameters, where one is known.
        unsent: items that vLLM's processor cache takes for sent since this request was rendered, with what
            makes it forget them. They are sent once the request has reached the engine.
    """

    params: CropParams | None = None
    handed_over: bool = False
    facts: list[ImageFacts] = field(default_factory=list)
    model_name: str | None = None
    adapters: Mapping[str, Any] = field(default_factory=dict)
    inner: CropRequest | None = None
    only_counts: bool = False
    request: Any = None
    unsent: dict[str, Callable[[str], None]] = field(default_factory=dict)

    def forget_unsent(self) -> None:
        """Make the cache forget what it believes and the engine never got: the request is over."""
        for mm_hash, forget in self.unsent.items():
            forget(mm_hash)
        self.unsent.clear()


current_request: ContextVar[RequestContext | None] = ContextVar("vllm_crop_request", default=None)
