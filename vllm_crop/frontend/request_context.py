# SPDX-License-Identifier: Apache-2.0
"""One request on its way: what the HTTP middleware read, and the facts that the renderer reports.

The facts become the header `x-crop-facts` and the metrics.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vllm_crop.config import FoveationConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.localizers.decision import Localization
from vllm_crop.localizers.heat import HeatMap
from vllm_crop.planning.foveation import Piece, tower_tokens
from vllm_crop.planning.geometry import Box, Region
from vllm_crop.request import ImageRequest

Source = Literal["request", "attention", "engine", "openai", "none", "off", "out_of_view"]
MAX_HEADER_BYTES = 4096
_LONGEST_REASON = 120  # characters of a region that cannot be used
_ALL = Box(0.0, 0.0, 1.0, 1.0)
_DECIMALS = 8  # enough to find the same tokens again from them


@dataclass(frozen=True)
class ImageFacts:
    """One image of a request.

    Attributes:
        tokens: visual tokens of the image unpruned.
        tokens_after_plc: placeholders it takes in the prompt.
        tokens_avg: embeddings a decoder layer runs with, averaged over layers.
        region: the region asked for, in fractions of the image as sent.
        source: where the region came from; "none", "off" and "out_of_view" images are served whole.
        localization: what the server's own localizer did, if it was asked.
        request: what was asked for the image, the server's configuration applied.
        pieces: what the vision tower sees instead of the whole image; empty if that is what it sees.
        foveation: the server's settings of it, of an image that could be seen in pieces.
        reason: why nothing of what was asked for could be done with it.
        resampled: whether trained queries have read it, with compression "resampler".
    """

    tokens: int
    tokens_after_plc: int
    tokens_avg: float
    region: Region | None
    source: Source
    localization: Localization | None = None
    request: ImageRequest | None = None
    pieces: tuple[Piece, ...] = ()
    foveation: FoveationConfig | None = None
    reason: str = ""
    resampled: bool = False

    @property
    def tower_tokens(self) -> int:
        """Visual tokens that the vision tower makes of what it sees, if none of it is cached."""
        if self.pieces:
            return tower_tokens(self.pieces)
        return self.tokens if self.tokens_after_plc else 0

    @property
    def saved_by(self) -> str:
        """What it costs less for: its region, or who bounds it."""
        return (self.request and self.request.by) or "region"

    @property
    def pruned(self) -> bool:
        """Whether the image costs less than it would in stock vLLM."""
        return self.tokens_avg < self.tokens

    def to_json(self, with_region: bool = True, with_heat: bool = True) -> dict[str, Any]:
        """Plain values, without boxes or maps where they would take too much room."""
        boxes = self.region and [[round(side, _DECIMALS) for side in box] for box in self.region.as_lists()]
        region = {"region": boxes} if with_region else {}
        found = self.localization
        return {
            "tokens": self.tokens,
            "tokens_after_plc": self.tokens_after_plc,
            "tokens_avg": round(self.tokens_avg, 2),
            **region,
            **({"tower_tokens": self.tower_tokens} if self.pieces else {}),
            **({"pieces": [piece.to_json() for piece in self.pieces]} if self.pieces and with_region else {}),
            "source": self.source,
            **({"by": self.request.by} if self.request and self.request.by else {}),
            **(
                {"max_tokens": bound}
                if self.request and (bound := self.request.max_tokens) is not None
                else {}
            ),
            **({"resampled": True} if self.resampled else {}),
            **({"reason": self.reason[:_LONGEST_REASON]} if self.reason else {}),
            **({"localizer": _localization_json(found, with_heat)} if found else {}),
        }


def facts_header(images: Sequence[ImageFacts]) -> str:
    """The value of `x-crop-facts`: totals, then the images as far as they fit into 4 KiB of ASCII."""
    totals = {
        "tokens": sum(image.tokens for image in images),
        "tokens_after_plc": sum(image.tokens_after_plc for image in images),
        "tokens_avg": round(sum(image.tokens_avg for image in images), 2),
        **_tower_json(images),
        "localizer_ms": _localizer_ms(images),
        **_settings_json(images),
    }
    for with_region, with_heat in ((True, True), (True, False), (False, False)):
        described = [image.to_json(with_region, with_heat) for image in images]
        header = json.dumps({**totals, "images": described}, separators=(",", ":"))
        if len(header) <= MAX_HEADER_BYTES:
            return header
    by = Counter(image.request.by for image in images if image.request and image.request.by)
    return json.dumps({**totals, "num_images": len(images), "by": dict(by)}, separators=(",", ":"))


def _tower_json(images: Sequence[ImageFacts]) -> dict[str, int]:
    """What the vision tower sees, where that is not all of all images."""
    if not any(image.pieces for image in images):
        return {}
    return {"tower_tokens": sum(image.tower_tokens for image in images)}


def _settings_json(images: Sequence[ImageFacts]) -> dict[str, Any]:
    """How the images were pruned: the same for all of a request, but for those that nobody was sure of."""
    sure = [image for image in images if image.localization is None or not image.localization.late]
    request = (sure or images)[0].request if images else None
    if request is None:
        return {}
    layers = {"eviction_layers": list(request.eviction_layers)} if request.eviction_layers else {}
    given = [image.foveation.model_dump(exclude_defaults=True) for image in images if image.foveation]
    foveation = {"foveation": given[0]} if any(given) else {}
    return {
        "method": "off" if request.off else request.method,
        "pruning_rate": request.pruning_rate,
        "compression": request.compression,
        "rim": request.rim,
        **layers,
        **foveation,
    }


def _localization_json(localization: Localization, with_heat: bool) -> dict[str, Any]:
    heat = localization.heat
    confidence, reason = localization.confidence, " ".join(localization.reason.split())
    return {
        "outcome": localization.outcome,
        "confidence": None if confidence is None else round(confidence, 4),
        "ms": round(1000 * localization.seconds, 1),
        "cached": localization.cached,
        **({"reason": reason[:_LONGEST_REASON]} if reason else {}),
        **({"peak": round(heat.peak, 4), "spread": round(heat.spread, 4)} if heat is not None else {}),
        **(_heat_json(heat, localization.window) if heat is not None and with_heat else {}),
    }


def _heat_json(heat: HeatMap, window: Box | None) -> dict[str, Any]:
    """The map in steps of a 255th of its hottest cell: a byte a cell, row by row, as base64."""
    rows, cols = heat.values.shape
    steps = (heat.values * (255 / heat.peak)).round().astype(np.uint8)
    return {
        "heat": {
            "rows": rows,
            "cols": cols,
            "window": [round(side, 5) for side in (window or _ALL).as_list()],
            "values": base64.b64encode(steps.tobytes()).decode(),
        }
    }


def _localizer_ms(images: Sequence[ImageFacts]) -> float | None:
    """Images are localized side by side: the request waits for the slowest."""
    seconds = [image.localization.seconds for image in images if image.localization is not None]
    return round(1000 * max(seconds), 1) if seconds else None


FACTS = "crop_facts"  # key of the engine's input: what the renderer says of its images


@dataclass
class RequestContext:
    """One HTTP request. The localizer's own requests run without one, offline ones too.

    Attributes:
        params: its `crop` field, None if absent.
        handed_over: whether a renderer took notice of `params`.
        facts: what became of the request's images.
        model_name: label to count the facts under once the request is accepted; None leaves them uncounted.
        in_batch: whether the route answers several conversations at once.
        only_counts: whether the route counts tokens and answers nothing.
        request: vLLM's own object for the request, with its sampling parameters, where one is known.
        unsent: items that vLLM's processor cache takes for sent since this request was rendered, with what
            makes it forget them. They are sent once the request has reached the engine.
        tracked: whether the middleware sees its answer: adds the facts, counts them, says when it is over.
        ended: whether it is over; a response made in the background goes on being rendered.
        afterwards: called when the request is over, with whether its whole answer was sent; they never raise.
    """

    params: CropParams | None = None
    handed_over: bool = False
    facts: list[ImageFacts] = field(default_factory=list)
    model_name: str | None = None
    in_batch: bool = False
    only_counts: bool = False
    request: Any = None
    unsent: dict[str, Callable[[str], None]] = field(default_factory=dict)
    afterwards: list[Callable[[bool], None]] = field(default_factory=list)
    tracked: bool = True
    ended: bool = False

    def forget_unsent(self) -> None:
        """Make the cache forget what it believes and the engine never got: the request is over."""
        for mm_hash, forget in self.unsent.items():
            forget(mm_hash)
        self.unsent.clear()

    def over(self, answered: bool) -> None:
        """Nothing more will come of the request; `answered`: its client has got all of the answer."""
        self.ended = True
        try:
            self.forget_unsent()
        finally:
            for call in self.afterwards:
                call(answered)
            self.afterwards.clear()


current_request: ContextVar[RequestContext | None] = ContextVar("vllm_crop_request", default=None)


def vllm_request() -> Any:
    """vLLM's object for the request being served over HTTP, None where none is known."""
    context = current_request.get()
    return None if context is None else context.request
