# SPDX-License-Identifier: Apache-2.0
"""Where the served model looks while it reads the question beside a view of the image: one prefill."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_crop.families.registry import VisionGeometry
from vllm_crop.frontend.own_request import Glance, OwnRequests
from vllm_crop.heat import request as heat_request
from vllm_crop.localizers.base import (
    LocalizerAnswer,
    LocalizerError,
    LocalizerName,
    UnreadableAnswerError,
    nothing,
)
from vllm_crop.localizers.heat import HeatGrid, HeatMap, heat_grid
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture, off_the_loop

# The prompt must end where a short answer begins: there the model knows what it has to look at.
PROMPT = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Rule:
    """How a map is made.

    Attributes:
        layers: of those that the server watches; None for all.
        weights: of each of them, ascending; None for the maximum.
    """

    layers: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None


class AttentionLocalizer:
    """A Localizer that reads the served model's attention."""

    name: LocalizerName = "attention"

    def __init__(self, renderer: Any, geometry: VisionGeometry, config: LocalizerConfig) -> None:
        """`renderer`: the server's CropRenderer."""
        self.requests = OwnRequests(renderer, geometry, config)
        self.renderer, self.geometry, self.config = renderer, geometry, config
        self.prompt = config.prompt or PROMPT
        # Views leave the model half way: their blocks in the prefix cache are good for nobody.
        self._apart = secrets.token_hex(16)
        # What workers watch is the maximum's; weights come with each request.
        weighted = Rule(tuple(config.layers or ()), tuple(config.weights or ()))
        self._rule = Rule() if config.weights is None else weighted
        settings = config.adapter, config.thumbnail_tokens, config.layers, config.weights, self.prompt
        windows = config.window, config.max_windows, config.further_window, config.warm_above
        self.version = " ".join(map(str, ("attention", *windows, *settings)))

    async def locate(
        self,
        picture: Picture,
        question: str,
        salt: str | None = None,
        waiting: Callable[[], None] = nothing,
    ) -> LocalizerAnswer:
        """Run one more request with a view of the image; cancelling this aborts it."""
        return await self.look(picture, question, self._rule, salt, waiting)

    async def look(
        self,
        picture: Picture,
        question: str,
        rule: Rule,
        salt: str | None = None,
        waiting: Callable[[], None] = nothing,
    ) -> LocalizerAnswer:
        """Locate by another rule than the configured one.

        Raises:
            LocalizerError: with the reason; an UnreadableAnswerError where one of them is not watched.
        """
        glance = await self.requests.glance(picture)
        grid = await off_the_loop(self._grid, glance)
        output = await self.requests.ask(
            glance, self._text(question), _sampling(grid, rule), self._salt(salt), waiting
        )
        return self._read(output, glance, grid)

    def locate_now(self, picture: Picture, question: str, salt: str | None = None) -> LocalizerAnswer:
        """The same for the offline `LLM`, whose other requests wait meanwhile."""
        glance = self.requests.glance_now(picture)
        grid = self._grid(glance)
        sampling = _sampling(grid, self._rule)
        output = self.requests.ask_now(glance, self._text(question), sampling, self._salt(salt))
        return self._read(output, glance, grid)

    def _salt(self, salt: str | None) -> str:
        return self._apart + (salt or "")

    def _text(self, question: str) -> str:
        return self.prompt.replace("{question}", question)

    def _grid(self, glance: Glance) -> HeatGrid:
        processor, tokens = self.renderer.mm_processor, self.geometry.grid(*glance.size)
        (decision,) = processor.planner.plan(glance.request, [glance.size])
        pooled = decision.compression
        return heat_grid(
            tokens, processor.unpruned_assignment(tokens) if pooled is None else pooled.assignment
        )

    def _read(self, output: Any, glance: Glance, grid: HeatGrid) -> LocalizerAnswer:
        places = output.outputs[0].logprobs
        if not places:
            raise LocalizerError("the engine ended the request before its first token")
        try:
            heat = HeatMap.of(grid, heat_request.read(places[0], grid.num_cells))
        except heat_request.NoHeatError as error:
            raise UnreadableAnswerError(str(error)) from None
        config = self.config
        seen = heat.region(config.window, config.max_windows, config.further_window)
        region = glance.shows.unproject(seen)
        if region is None:
            raise UnreadableAnswerError("the hottest place is in the padding around the image")
        warm = heat.warm(seen, config.warm_above) if config.warm_above else None
        return LocalizerAnswer(
            region, heat.within(seen), heat, glance.shows, warm and glance.shows.unproject(warm)
        )


def _sampling(grid: HeatGrid, rule: Rule) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprob_token_ids=heat_request.token_ids(grid.num_cells),
        detokenize=False,
        watermarking=False,
        # Keys of tokens that are not computed again would not come by.
        skip_reading_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=heat_request.extra_args(
            grid.cells, grid.num_cells, leaves=True, layers=rule.layers, weights=rule.weights
        ),
    )
