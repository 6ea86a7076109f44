# SPDX-License-Identifier: Apache-2.0
"""From what a localizer says to the region an image is served with."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vllm_crop.localizers.base import LocalizerAnswer, LocalizerName, UnreadableAnswerError
from vllm_crop.localizers.heat import HeatMap
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.planning.geometry import Box, Region

Fallback = Literal[
    "low_confidence",
    "timeout",
    "error",
    "unreadable",
    "no_question",
    "no_image",
    "too_many",
    "suspended",
    "not_possible",
]
_Found = Literal["region", "widened", "global", "not_asked"]
Outcome = _Found | Fallback
OUTCOMES: tuple[str, ...] = get_args(_Found)  # beside FALLBACKS
FALLBACKS: tuple[str, ...] = get_args(Fallback)


@dataclass(frozen=True)
class Localization:
    """What became of one image's question.

    Attributes:
        region: None serves the image whole.
        outcome: "global" is the localizer's own answer; FALLBACKS are not; "not_asked" is a prompt nobody
            will answer, as it is only tokenized or will be refused, or an image of which no part counts more
            than another. "too_many" images were sent at once; the localizer is "suspended" after failures; a
            region is "not_possible" for this image or beside other settings of the request.
        localizer: its name.
        confidence: None where it is unknown.
        seconds: from the question to the decision, waiting included.
        cached: whether the answer was known.
        reason: of an image that is "not_possible", or whose localization is not sure, in words.
        heat: where the model looked, over `window`, in fractions of the image.
        warm: places outside the region that are kept as its rim is.
        late: the image is pruned evenly in late layers.
    """

    region: Region | None
    outcome: Outcome
    localizer: LocalizerName
    confidence: float | None = None
    seconds: float = 0.0
    cached: bool = False
    reason: str = ""
    heat: HeatMap | None = None
    window: Box | None = None
    warm: Region | None = None
    late: bool = False


def settle(located: LocalizerAnswer, config: LocalizerConfig) -> tuple[Region | None, Outcome]:
    """The region an image is served with, by the thresholds of the configuration.

    An unknown confidence counts as certain.

    Raises:
        UnreadableAnswerError: the confidence is no number.
    """
    if located.region is None:
        return None, "global"
    confidence = 1.0 if located.confidence is None else located.confidence
    if not math.isfinite(confidence):
        raise UnreadableAnswerError(f"a confidence of {confidence}")
    if confidence < config.least_confidence:
        return None, "low_confidence"
    widened = confidence < config.widen_below
    margin = config.margin + (config.widen_by if widened else 0.0)
    boxes = tuple(_grown(box.widened(margin), config.min_area) for box in located.region.boxes)
    return Region(boxes), "widened" if widened else "region"


def _grown(box: Box, min_area: float) -> Box:
    """At least so large, around the same middle as far as the image allows; narrow boxes become wider."""
    width, height = box.x1 - box.x0, box.y1 - box.y0
    if width * height >= min_area:
        return box
    side = min_area**0.5
    width, height = (
        max(width, min_area / max(height, side)),
        max(height, min_area / max(width, side)),
    )
    x0, y0 = _around(box.x0, box.x1, width), _around(box.y0, box.y1, height)
    return Box(x0, y0, min(1.0, x0 + width), min(1.0, y0 + height))


def _around(first: float, last: float, length: float) -> float:
    return min(max(0.0, (first + last - length) / 2), 1.0 - length)
