# SPDX-License-Identifier: Apache-2.0
"""The served model says where the region is: one short request with a thumbnail before the real one."""

import math
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from vllm_crop.families.registry import VisionGeometry
from vllm_crop.frontend.own_request import Glance, OwnRequests
from vllm_crop.localizers.base import LocalizerAnswer, LocalizerName, UnreadableAnswerError, nothing
from vllm_crop.localizers.dialects import dialect_with
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture


class EngineLocalizer:
    """A Localizer that is the served model."""

    name: LocalizerName = "engine"

    def __init__(self, renderer: Any, geometry: VisionGeometry, config: LocalizerConfig) -> None:
        """`renderer`: the server's CropRenderer."""
        self.requests = OwnRequests(renderer, geometry, config)
        self.renderer = renderer
        self.dialect = dialect_with(config.dialect, config.prompt)
        self.version = (
            f"engine {config.adapter} {config.dialect} {config.thumbnail_tokens} {self.dialect.prompt}"
        )

    async def locate(
        self,
        picture: Picture,
        question: str,
        salt: str | None = None,
        waiting: Callable[[], None] = nothing,
    ) -> LocalizerAnswer:
        """Ask the engine as one more request; cancelling this aborts it."""
        glance = await self.requests.glance(picture)
        text = self.dialect.ask(question)
        return self._read(await self.requests.ask(glance, text, self._sampling(), salt, waiting), glance)

    def locate_now(self, picture: Picture, question: str, salt: str | None = None) -> LocalizerAnswer:
        """The same for the offline `LLM`, whose other requests wait meanwhile."""
        glance = self.requests.glance_now(picture)
        text = self.dialect.ask(question)
        return self._read(self.requests.ask_now(glance, text, self._sampling(), salt), glance)

    def _sampling(self) -> SamplingParams:
        # The answer is read from token ids: what a server does to the text of answers does not matter.
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.dialect.max_tokens,
            logprobs=0,
            detokenize=False,
            watermarking=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(regex=self.dialect.regex),
        )

    def _read(self, output: Any, glance: Glance) -> LocalizerAnswer:
        said = output.outputs[0]
        text = self.renderer.get_tokenizer().decode(list(said.token_ids), skip_special_tokens=True)
        logprob = said.cumulative_logprob
        # In this order what is no number stays none, and is no confidence.
        confidence = None if logprob is None else math.exp(min(logprob, 0.0))
        region = self.dialect.read(text, glance.pixels)
        if region is None:
            return LocalizerAnswer(None, confidence)
        in_image = glance.shows.unproject(region)
        if in_image is None:
            raise UnreadableAnswerError("a place in the padding around the image")
        return LocalizerAnswer(in_image, confidence)
