# SPDX-License-Identifier: Apache-2.0
"""LocalizerConfig: who finds regions, and what is made of the answer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_crop.heat.request import LARGEST_WEIGHT
from vllm_crop.localizers.dialects import DialectName

Kind = Literal["request", "attention", "engine", "openai"]
# Visual tokens of a view. Of kind 'attention' about as many as published studies found enough for photos, and
# not so many that looking costs what pruning saves.
SMALLEST_VIEW, LARGEST_VIEW, VIEW_SHARE = 64, 300, 6
FLAT = 0.1  # a fixed window on a flat map has 0 beyond its share of the area
# Of the depth: where layers look at what a question is about. Later ones hold little more of it.
LOOKING = 0.35, 0.71
WhenUnsure = Literal["whole", "late"]
Pinning = Literal["pinned", "latest", "off"]


# Who is asked what: settings that other kinds have no use for. The view's size is foveation's too.
_OF_ALL: tuple[Kind, ...] = ("request", "attention", "engine", "openai")
_OF_KINDS: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(("kind", "thumbnail_tokens"), _OF_ALL),
    **dict.fromkeys(("layers", "weights", "calibration", "window"), ("attention",)),
    **dict.fromkeys(("max_windows", "further_window", "warm_above"), ("attention",)),
    **dict.fromkeys(("priority", "adapter", "chat_template_kwargs"), ("attention", "engine")),
    "dialect": ("engine", "openai"),
    **dict.fromkeys(("thumbnail_side", "base_url", "model", "api_key_env"), ("openai",)),
    **dict.fromkeys(("max_retries", "logprobs", "extra_body"), ("openai",)),
}


def suits(name: str, kind: Kind) -> bool:
    """Whether a setting means something to a kind; those that nobody knows are left to pydantic."""
    return kind in _OF_KINDS.get(name, _OF_ALL[1:])


class LocalizerConfig(BaseModel):
    """`localizer` in the server's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Kind = Field(
        default="request",
        description="Who finds the region of a question: 'request' leaves it to the client; 'attention' "
        "takes where the served model looks while it reads the question beside a small view of the image; "
        "'engine' lets it say where, of a thumbnail; 'openai' asks another OpenAI-compatible server.",
    )
    conversation: Pinning = Field(
        default="pinned",
        description="Which question an image's region answers: 'pinned' that of the message the image came "
        "with, so that the prefix cache keeps working; 'latest' the conversation's last one; 'off' none. A "
        "request's `crop.localize` overrides it.",
    )
    dialect: DialectName = Field(
        default="cells",
        description="How the localizer says where: 'cells' of an 8x8 grid as digits, 'pixels' as JSON boxes "
        "(Qwen2.5-VL), 'thousandths' as JSON boxes from 0 to 1000 (Qwen3-VL).",
    )
    prompt: str | None = Field(
        default=None,
        max_length=4000,
        description="What the localizer is asked, {question} standing for the question. Left out: the "
        "dialect's own words; for kind 'attention' the question and that a word or a phrase is enough.",
    )
    thumbnail_tokens: int | None = Field(
        default=None,
        ge=4,
        description="Most visual tokens of the image that kinds 'attention' and 'engine' look at. Left out: "
        f"for 'attention' 1/{VIEW_SHARE} of the image's, {SMALLEST_VIEW} to {LARGEST_VIEW}; for 'engine' "
        f"{SMALLEST_VIEW}.",
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Decoder layers whose attention kind 'attention' reads. Left out: those from "
        f"{LOOKING[0]} to {LOOKING[1]} of the depth.",
    )
    weights: list[Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]] | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="How much each of `layers`, ascending, counts: their maps are multiplied, each to the "
        "power of its weight. `vllm-crop calibrate --fit` finds them. Left out: of several layers the "
        "maximum.",
    )
    calibration: str | None = Field(
        default=None,
        max_length=4000,
        description="A file of `vllm-crop calibrate`, whose settings hold where none are given here: layers, "
        "the view, the prompt and whole_below. Read once, at start; kind 'attention'.",
    )
    window: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Side of the region around the hottest place of a map, as a fraction of the image's; "
        "kind 'attention'.",
    )
    max_windows: int = Field(
        default=2, ge=1, le=8, description="Most places of one image that kind 'attention' finds."
    )
    further_window: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="How hot a further place must be, as a fraction of the hottest; kind 'attention'.",
    )
    warm_above: float = Field(
        default=0.0,
        ge=0,
        description="How many times hotter than the mean a place outside the region must be to be kept as "
        "the rim is; 0 for none; kind 'attention'.",
    )
    thumbnail_side: int = Field(
        default=768, ge=56, le=4096, description="Longer side in pixels of the image sent to kind 'openai'."
    )
    margin: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Added around every box, as a fraction of the image's sides.",
    )
    min_area: float = Field(
        default=0.0, ge=0, le=1, description="Boxes are grown to at least this fraction of the image."
    )
    whole_below: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Serve the image whole if the localizer's confidence is less. Left out: "
        f"{FLAT} for kind 'attention', whose map is flat then, else 0.",
    )
    when_unsure: WhenUnsure = Field(
        default="whole",
        description="What becomes of an image whose localization is less confident than whole_below: 'whole' "
        "serves it unpruned, 'late' evicts evenly in late layers alone, which needs eviction_layers whose "
        "last one is at 0.57 of the depth or later.",
    )
    widen_below: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Widen the region by widen_by if the localizer's confidence is less.",
    )
    widen_by: float = Field(
        default=0.125,
        ge=0,
        le=0.5,
        description="How far, as a fraction of the image's sides; a cell is 0.125.",
    )
    timeout_s: float = Field(
        default=5.0, gt=0, le=600, description="Seconds until the image is served whole instead."
    )
    max_running: int = Field(
        default=64, ge=1, description="Localizations at once in one API server; the others wait their turn."
    )
    max_running_per_request: int = Field(
        default=8, ge=1, description="Of these, how many one request may have, so that others get theirs."
    )
    max_images: int = Field(
        default=32,
        ge=1,
        description="Images of one request that are localized; further ones are served whole.",
    )
    suspend_after: int = Field(
        default=5,
        ge=1,
        description="Requests in a row without an answer (timeout, error) after which nobody is asked for "
        "suspend_s seconds.",
    )
    suspend_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Seconds until one request asks again whether the localizer is back.",
    )
    cache_entries: int = Field(
        default=8192, ge=0, description="Regions remembered by image and question, for retries."
    )
    priority: int = Field(
        default=0,
        description="Priority of the request of kinds 'attention' and 'engine', with --scheduling-policy "
        "priority; lower is earlier.",
    )
    adapter: str | None = Field(
        default=None,
        description="Name of a loaded LoRA adapter (--lora-modules) that kinds 'attention' and "
        "'engine' run with.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="For the chat template, such as {'enable_thinking': false}; kinds "
        "'attention' and 'engine'.",
    )
    base_url: str | None = Field(
        default=None, description="Of kind 'openai', such as http://localizer:8000/v1."
    )
    model: str | None = Field(default=None, description="Of kind 'openai': the model's name.")
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable with the key for kind 'openai'."
    )
    max_retries: int = Field(
        default=1, ge=0, le=10, description="Of kind 'openai', within timeout_s and only where it may help."
    )
    logprobs: bool = Field(
        default=True,
        description="Ask kind 'openai' for logprobs, which its confidence is read from.",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="More fields of the request to kind 'openai'."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "openai" and not (self.base_url and self.model):
            raise ValueError("localizer.kind 'openai' needs localizer.base_url and localizer.model")
        if self.weights is not None and (
            self.layers is None
            or len(self.layers) != len(self.weights)
            or any(one >= other for one, other in pairwise(self.layers))
        ):
            raise ValueError("localizer.weights needs localizer.layers, ascending, one weight for each")
        if self.widen_by != type(self).model_fields["widen_by"].default and not self.widen_below:
            raise ValueError("localizer.widen_by needs localizer.widen_below: how unsure is to be widened")
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError("localizer.prompt must contain {question}")
        for name, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True)
            if not suits(name, self.kind) and getattr(self, name) != default:
                owners = " or ".join(repr(kind) for kind in _OF_ALL if suits(name, kind))
                raise ValueError(
                    f"localizer.{name} belongs to localizer.kind {owners}, and the kind is {self.kind!r}"
                )
        return self

    def view_tokens(self, full: int) -> int:
        """Most visual tokens that the served model is shown of an image that has `full` of them."""
        if self.thumbnail_tokens is not None:
            return self.thumbnail_tokens
        if self.kind == "engine":
            return SMALLEST_VIEW
        return min(LARGEST_VIEW, max(SMALLEST_VIEW, full // VIEW_SHARE))

    def layers_of(self, num_layers: int, looking: Sequence[int]) -> list[int]:
        """The layers whose attention is read, ascending, of a decoder with this many.

        Args:
            looking: those that look at every earlier token, ascending.
        """
        if self.layers is not None:
            return sorted(set(self.layers))
        first, last = (int(share * num_layers) for share in LOOKING)
        in_the_middle = [layer for layer in looking if first <= layer < max(first + 1, last)]
        return in_the_middle or [min(looking, key=lambda layer: abs(layer - first))]

    @property
    def least_confidence(self) -> float:
        """Below it the image is served whole."""
        if self.whole_below is not None:
            return self.whole_below
        return FLAT if self.kind == "attention" else 0.0

    @property
    def localizes(self) -> bool:
        """Whether the server finds regions by itself."""
        return self.kind != "request"
