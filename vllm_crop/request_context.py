# SPDX-License-Identifier: Apache-2.0
"""What the HTTP middleware and the renderer tell each other about the request being served."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_crop.facts import ImageFacts
from vllm_crop.params import CropParams


@dataclass
class RequestContext:
    """One HTTP request: its `crop` field on the way in (None if absent), the facts on the way out."""

    params: CropParams | None = None
    facts: list[ImageFacts] = field(default_factory=list)


current_request: ContextVar[RequestContext | None] = ContextVar("vllm_crop_request", default=None)
