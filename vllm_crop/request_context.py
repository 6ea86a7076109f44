# SPDX-License-Identifier: Apache-2.0
"""What the HTTP middleware and the renderer tell each other about the request being served."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_crop.facts import ImageFacts
from vllm_crop.params import CropParams


@dataclass
class RequestContext:
    """One HTTP request.

    Attributes:
        params: its `crop` field, None if absent.
        handed_over: whether a renderer took notice of `params`.
        facts: what became of the request's images.
        model_name: label to count the facts under once the request is accepted; None leaves them uncounted.
        adapters: the server's loaded LoRA adapters by name.
        inner: whether this is the localizer's own request.
    """

    params: CropParams | None = None
    handed_over: bool = False
    facts: list[ImageFacts] = field(default_factory=list)
    model_name: str | None = None
    adapters: Mapping[str, Any] = field(default_factory=dict)
    inner: bool = False


current_request: ContextVar[RequestContext | None] = ContextVar("vllm_crop_request", default=None)
