# SPDX-License-Identifier: Apache-2.0
"""From what is asked for a request's images to their TokenPlans: the one path of server and commands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams, InvalidCropError
from vllm_crop.errors import UnsupportedImageError
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.planning.budget import BudgetError, Method, retained_count
from vllm_crop.planning.fitting import Claim, NoRoomError, share_room
from vllm_crop.planning.foveation import Piece, Sight, tower_tokens
from vllm_crop.planning.geometry import ImageTokens, Region
from vllm_crop.planning.image_budgets import ImageBudget
from vllm_crop.planning.plan import (
    TokenPlan,
    even_plan,
    make_plan,
    overview_plan,
    small_plan,
    whole_image_plan,
)
from vllm_crop.request import CropRequest, Found, ImageRequest, Room

Size = tuple[int, int]
Whole = Literal["no_region", "out_of_view", "not_possible"]
# After so much of the depth a tenth of the visual tokens does, any of them (docs/localization.md, "How to
# choose"): the words of the answer have been read by then.
LATE, KEPT_LATE = 0.57, 0.1
_CANNOT_PRUNE = (InvalidCropError, UnsupportedImageError)
_NOT_BESIDE = "; beside mm_processor_kwargs of the request none can be pruned"


@dataclass(frozen=True)
class ImagePlan:
    """The plan of one image.

    Attributes:
        region: what the model sees of the region asked for, None if nothing.
        tokens: what becomes of its visual tokens.
        pieces: what the vision tower sees instead of the whole image; empty if that is what it sees.
    """

    region: Region | None
    tokens: TokenPlan
    pieces: tuple[Piece, ...] = ()

    @property
    def tower_tokens(self) -> int:
        """Visual tokens that the vision tower makes of what it sees."""
        return tower_tokens(self.pieces) if self.pieces else self.tokens.grid.num_tokens

    def to_json(self, num_layers: int) -> dict[str, Any]:
        """The plan as it is printed, with what the vision tower sees where that is not all of the image."""
        plan = self.tokens.to_json(num_layers)
        if not self.pieces:
            return plan
        pieces = [piece.to_json() for piece in self.pieces]
        return {**plan, "tower_tokens": self.tower_tokens, "pieces": pieces}

    @property
    def prunes(self) -> bool:
        """Whether some decoder layer runs with fewer embeddings than the image has tokens."""
        return self.tokens.compresses or self.tokens.evicts


@dataclass(frozen=True)
class ImageDecision:
    """What is done with one image of a request.

    Attributes:
        request: as it is carried out: without the region where one cannot be used.
        plan: None serves the image whole.
        whole: why it does; "not_possible" is a region that the server found and cannot use.
        reason: in words, why it cannot.
        mrope_position_delta: how many more position ids the image takes than tokens, if they are the original
            ones.
        pieces: as of ImagePlan.
    """

    request: ImageRequest
    plan: TokenPlan | None = None
    whole: Whole = "no_region"
    mrope_position_delta: int = 0
    reason: str = ""
    pieces: tuple[Piece, ...] = ()

    @property
    def compression(self) -> TokenPlan | None:
        """The plan if embeddings are compressed before the language model."""
        return self.plan if self.plan is not None and self.plan.compresses else None


@dataclass(frozen=True)
class Planner:
    """Plans images as one server does.

    Attributes:
        config: the server's settings.
        geometry: grid and view of the model it serves.
        sees_small: whether the vision tower may be shown an image small where that is all that is left of it.
    """

    config: CropConfig
    geometry: VisionGeometry
    sees_small: bool = True

    def plan(
        self,
        asked: CropRequest,
        sizes: Sequence[Size | None],
        embeddings: bool = False,
        other_kwargs: Sequence[str] = (),
    ) -> tuple[ImageDecision, ...]:
        """Plan every image of a request.

        Args:
            sizes: per image, width and height in pixels; None where they are not known.
            embeddings: the images came as embeddings, which have no pixels.
            other_kwargs: names of the request's own processor settings, which can move an image under its
                region.

        Raises:
            InvalidCropError: the client asks for what cannot be done with its images, or they do not fit
                however little is left of them.
            UnsupportedImageError: for a client's region; the image processor refuses the image too.
        """
        if self.geometry.why_no_regions:
            self._refuse_what_is_about_regions(asked.params)
        if asked.found is not None and len(asked.found) != len(sizes):
            asked = replace(asked, found=(Found(),) * len(sizes))  # embeddings that vLLM has taken apart
        requests = asked.images(self.config, len(sizes))
        if asked.found is not None and asked.params.method != "plc":
            requests = [
                self._pruned_late(request) if one.late and not request.off and request.by is None else request
                for request, one in zip(requests, asked.found, strict=True)
            ]
        # Image by image, so that one that cannot be pruned takes none along.
        decisions: list[ImageDecision] = []
        for request, size in zip(requests, sizes, strict=True):
            try:
                decision = self._checked(request, size, embeddings, other_kwargs)
            except _CANNOT_PRUNE as error:
                if is_clients_wish(request, asked):
                    raise
                decision = ImageDecision(request.without_budget(), whole="not_possible", reason=str(error))
            decisions.append(decision)
        if asked.room is not None:
            decisions = self._fitted(decisions, sizes, asked.room, asked.budgets or (), not other_kwargs)
        return tuple(decisions)

    def plan_image(self, request: ImageRequest, width: int, height: int) -> ImagePlan:
        """Plan an image of this size in pixels; without a region in view it is left whole.

        Raises:
            InvalidCropError: the pruning rate cannot be met with the request's eviction layers.
            UnsupportedImageError: the image processor refuses such an image.
        """
        grid = self.geometry.grid(width, height)
        view = self.geometry.view(width, height)
        if request.region is not None and self.geometry.why_no_regions:
            raise self._no_regions("regions")
        region = request.region and view.project(request.region)
        if request.max_tokens is not None and request.max_tokens >= grid.num_tokens:
            return ImagePlan(region, whole_image_plan(grid))
        rate = request.rate_for(grid.num_tokens)
        if region is None and request.max_tokens is not None and request.method == "ilp":
            region = Region.whole()  # of which some is evicted like the rest
        if region is None:
            if request.max_tokens is None:
                return ImagePlan(None, whole_image_plan(grid, request.pruning_rate))
            return self._seen_evenly(request, width, height, grid)
        around = view.project(request.around) if request.around else None
        if request.overview and request.compression == "foveate":
            overview = self.geometry.overview(width, height)
            unseen = self.geometry.unseen(width, height, overview)
            if unseen is not None:
                return ImagePlan(region, overview_plan(grid, unseen, rate), overview)
        sight = self._sight(request, grid.num_tokens)
        pieces = self.geometry.foveate(width, height, region, around, sight) if sight else ()
        leaves_out = self.config.foveation.unseen_tiles == "left_out"
        try:
            tokens = make_plan(
                grid,
                region,
                rate,
                request.compression,
                request.method,
                self.geometry.num_layers,
                request.eviction_layers,
                around,
                self.geometry.unseen(width, height, pieces) if leaves_out else None,
            )
        except BudgetError as error:
            if request.max_tokens is None:
                raise InvalidCropError("crop.pruning_rate", str(error)) from None
            # The sentence speaks of rates, which cannot be sent beside it.
            few = f"{request.max_tokens} of {grid.num_tokens} tokens are too few for {request.method!r}"
            needed = "" if error.least is None else f", which needs {error.least} with these eviction layers"
            raise InvalidCropError("crop.max_tokens", few + needed) from None
        return ImagePlan(region, tokens, pieces if tokens.compresses else ())

    def _refuse_what_is_about_regions(self, params: CropParams) -> None:
        about_regions = {
            "regions": any(region is not None for region in params.regions or ()),
            "pruning_rate": params.pruning_rate is not None,
        }
        for name in (name for name, is_asked in about_regions.items() if is_asked):
            raise self._no_regions(name)

    def _no_regions(self, name: str) -> InvalidCropError:
        return InvalidCropError(
            f"crop.{name}",
            f"not possible with this model: {self.geometry.why_no_regions}. Send `max_tokens` instead, "
            f"{self.geometry.fewest_tokens} or more, for all of an image",
        )

    def _seen_evenly(self, request: ImageRequest, width: int, height: int, grid: ImageTokens) -> ImagePlan:
        """All of an image alike, in `max_tokens` at most: seen small where that can be, else pooled."""
        assert request.max_tokens is not None
        count = max(1, request.max_tokens)
        pieces = self.geometry.small(width, height, count) if self.sees_small else ()
        if not pieces and self.geometry.why_no_regions:
            least = tower_tokens(self.geometry.small(width, height, self.geometry.fewest_tokens))
            raise InvalidCropError(
                field_of(request),
                f"{count} tokens are too few: this model sees an image of this size in {least} at least",
            )
        if not pieces:
            return ImagePlan(None, even_plan(grid, count, request.compression))
        unseen = self.geometry.unseen(width, height, pieces)
        if unseen is not None:  # the prompt has all of the image once small anyway
            return ImagePlan(None, even_plan(grid, count, request.compression, unseen), pieces)
        (part,) = grid.parts
        return ImagePlan(None, small_plan(part.grid, pieces[0].scale), pieces)

    def _fitted(
        self,
        decisions: Sequence[ImageDecision],
        sizes: Sequence[Size | None],
        room: Room,
        budgets: Sequence[ImageBudget],
        possible: bool,
    ) -> list[ImageDecision]:
        """The decisions for images that fit together into the prompt's room.

        Args:
            possible: whether images of the request can be pruned at all.

        Raises:
            InvalidCropError: they do not fit, and there is not even room for the floor of each.
        """
        if any(size is None for size in sizes):
            return list(decisions)  # embeddings, and images that nobody knows: counted when they are expanded
        known: list[Size] = [size for size in sizes if size is not None]
        claims = [
            self._claim(decision, size, index < len(budgets) and budgets[index].old)
            for index, (decision, size) in enumerate(zip(decisions, known, strict=True))
        ]
        taken = sum(claim.tokens for claim in claims)
        if taken <= room.most:
            return list(decisions)
        if not room.prunes or not possible:
            room.check(taken, room.advice if possible else _NOT_BESIDE)
        floor = max(self.config.fit_floor, self.geometry.fewest_tokens)
        try:
            given = share_room(claims, room.aim, floor)
        except NoRoomError as error:
            if error.least > room.most:
                what = f"take at least {error.least} visual tokens, with {floor} for each"
                raise room.refusal(what) from None
            given = share_room(claims, error.least, floor)  # what is left is the answer's
        return [
            decision
            if tokens == claim.tokens
            else self._decide(_brought_to_fit(decision.request, tokens), size, embeddings=False)
            for decision, size, claim, tokens in zip(decisions, known, claims, given, strict=True)
        ]

    def _claim(self, decision: ImageDecision, size: Size, is_old: bool) -> Claim:
        grid = self.geometry.grid(*size)
        tokens = grid.num_tokens if decision.plan is None else decision.plan.num_embeddings
        region = decision.request.region and self.geometry.view(*size).project(decision.request.region)
        return Claim(tokens, 0 if region is None else int(grid.mask(region).sum()), is_old)

    def _sight(self, request: ImageRequest, full: int) -> Sight | None:
        """How the vision tower is to see an image of `full` visual tokens; None for all of it as it is."""
        if request.compression != "foveate" or request.method == "ilp":
            return None
        settings = self.config.foveation
        return Sight(self.view_tokens(full), settings.halo, half_rims=settings.rim_size == "half")

    def view_tokens(self, full: int) -> int:
        """Most visual tokens that a foveated image with `full` of them is seen in as a whole."""
        return self.config.foveation.view_tokens or self.config.localizer.view_tokens(full)

    def fewest_embeddings(self, full: int, pruning_rate: float, method: Method) -> int:
        """The fewest that an image with `full` visual tokens can take in the prompt, whatever its region."""
        if method == "ilp" or self.geometry.why_no_regions:
            return full
        settings = self.config
        if settings.compression == "foveate" and settings.foveation.unseen_tiles == "left_out":
            return 1
        return retained_count(full, pruning_rate)

    def _pruned_late(self, request: ImageRequest) -> ImageRequest:
        """All of the image alike, from the last eviction layer on, if that is late enough; else as it is."""
        num_layers = self.geometry.num_layers
        layer = self.config.stages[-1] if self.config.stages else 0
        if layer < LATE * num_layers:
            return request
        rate = min(request.pruning_rate, (1 - layer / num_layers) * (1 - KEPT_LATE))
        return replace(
            request, region=Region.whole(), method="ilp", eviction_layers=(layer,), pruning_rate=rate
        )

    def _decide(self, request: ImageRequest, size: Size | None, embeddings: bool) -> ImageDecision:
        if not request.wants_less:
            return ImageDecision(request)
        if embeddings:
            raise InvalidCropError(field_of(request), "not possible for image embeddings")
        if size is None:  # a uuid alone that nobody knows: vLLM says so when it misses the image
            return ImageDecision(request.without_budget())
        planned = self.plan_image(request, *size)
        if not planned.prunes:
            seen = planned.region is not None or request.region is None
            return ImageDecision(request, whole="no_region" if seen else "out_of_view")
        span = self.geometry.position_span(planned.tokens.grid)
        delta = max(0, span - planned.tokens.num_embeddings)
        return ImageDecision(request, planned.tokens, mrope_position_delta=delta, pieces=planned.pieces)

    def _checked(
        self,
        request: ImageRequest,
        size: Size | None,
        embeddings: bool,
        other_kwargs: Sequence[str],
    ) -> ImageDecision:
        _refuse_beside(other_kwargs, request)
        try:
            return self._decide(request, size, embeddings)
        except InvalidCropError:
            if request.by != "server" or not request.eviction_layers or embeddings:
                raise
            # The server's own bound is too small for the client's method: it holds all the same.
            assert request.max_tokens is not None
            return self._decide(request.bounded(request.max_tokens), size, embeddings)


def _brought_to_fit(request: ImageRequest, tokens: int) -> ImageRequest:
    """No more than what it was to cost on average before."""
    bound = tokens if request.max_tokens is None else min(tokens, request.max_tokens)
    return replace(request.bounded(bound), by="fit")


def field_of(request: ImageRequest) -> str:
    """Which of the client's fields asks for less of an image."""
    if request.by == "history":
        return "crop.history"
    return "crop.regions" if request.region is not None else "crop.max_tokens"


def is_clients_wish(request: ImageRequest, asked: CropRequest) -> bool:
    """Whether the client itself wants less of an image; what the server wants fails no request."""
    if request.by == "history":
        return asked.params.history is not None
    return request.by == "max_tokens" or (asked.found is None and request.region is not None)


def _refuse_beside(other_kwargs: Sequence[str], request: ImageRequest) -> None:
    if not other_kwargs or not request.wants_less:
        return
    raise InvalidCropError(
        field_of(request),
        f"not possible beside other mm_processor_kwargs of the request, {sorted(other_kwargs)}: "
        "they can move the image under the region",
    )
