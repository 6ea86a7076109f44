# SPDX-License-Identifier: Apache-2.0
"""The served model finds the region itself: one short request with a thumbnail before the real one."""

import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from vllm_crop.families.registry import VisionGeometry
from vllm_crop.frontend.settling import LOCALIZERS_OWN
from vllm_crop.localizers.base import LocalizerAnswer, LocalizerError, LocalizerName, UnreadableAnswerError
from vllm_crop.localizers.dialects import dialect_with
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import not_huge, off_the_loop, shrink, size_for_tokens
from vllm_crop.models.processor import REQUEST_KEY
from vllm_crop.models.sent import newly_sent
from vllm_crop.planning.geometry import ImageView, Region
from vllm_crop.request import CropParams, CropRequest


@dataclass(frozen=True)
class _Glance:
    """What the model is shown, and what is done with its tokens.

    Attributes:
        picture: of the same aspect as the image.
        shows: the part of it that the model sees.
        pixels: width and height of that part, as the model is shown it.
    """

    picture: Image.Image
    request: CropRequest
    shows: ImageView
    pixels: tuple[int, int]


class EngineLocalizer:
    """A Localizer that is the served model."""

    name: LocalizerName = "engine"

    def __init__(self, renderer: Any, geometry: VisionGeometry, config: LocalizerConfig) -> None:
        """`renderer`: the server's CropRenderer, whose `engine` answers."""
        self.renderer, self.geometry, self.config = renderer, geometry, config
        self.dialect = dialect_with(config.dialect, config.prompt)
        self.version = (
            f"engine {config.adapter} {config.dialect} {config.thumbnail_tokens} {self.dialect.prompt}"
        )

    async def locate(self, image: Image.Image, question: str, salt: str | None = None) -> LocalizerAnswer:
        """Ask the engine as one more request; cancelling this aborts it."""
        engine, options = self._engine(ServingEngine), self._options()
        glance = await off_the_loop(self._glance, image)
        _, prompts = await self.renderer.render_chat_async(
            [self._messages(glance, question)], self._chat_params(), prompt_extras=_extras(glance, salt)
        )
        with self._own(prompts[0]):
            output = await engine.generate(prompts[0], self._sampling(), options)
        return self._read(output, glance)

    def locate_now(self, image: Image.Image, question: str, salt: str | None = None) -> LocalizerAnswer:
        """The same for the offline `LLM`, whose other requests wait meanwhile."""
        engine, options = self._engine(OfflineEngine), self._options()
        glance = self._glance(image)
        _, prompts = self.renderer.render_chat(
            [self._messages(glance, question)], self._chat_params(), prompt_extras=_extras(glance, salt)
        )
        with self._own(prompts[0]):
            output = engine.generate(prompts[0], self._sampling(), options)
        return self._read(output, glance)

    def _engine(self, kind: type) -> Any:
        engine = self.renderer.engine
        if not isinstance(engine, kind):
            raise LocalizerError("this process has no engine to ask")
        return engine

    def _glance(self, image: Image.Image) -> _Glance:
        size = size_for_tokens(self.geometry, *image.size, self.config.thumbnail_tokens)
        if size is not None:
            picture, request = shrink(image, size), CropRequest(CropParams(method="off"), limited=False)
        else:
            # Every image costs the same here: average its tokens over the whole image instead.
            picture = not_huge(image)
            full = self.geometry.grid(*picture.size).num_tokens
            rate = 1 - self.config.thumbnail_tokens / full
            whole = CropParams(regions=[Region.whole()], pruning_rate=rate, method="plc")
            request = CropRequest(whole, limited=False)
        shows = self.geometry.view(*picture.size)
        return _Glance(picture, request, shows, self.geometry.pixels(*picture.size))

    def _messages(self, glance: _Glance, question: str) -> list[Any]:
        image = {"type": "image_pil", "image_pil": glance.picture}
        content = [image, {"type": "text", "text": self.dialect.ask(question)}]
        return [{"role": "user", "content": content}]

    def _chat_params(self) -> ChatParams:
        given = {"add_generation_prompt": True, "tokenize": False, **self.config.chat_template_kwargs}
        return ChatParams(chat_template=self.renderer.chat_template, chat_template_kwargs=given)

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

    def _options(self) -> dict[str, Any]:
        request_id = f"crop-localizer-{uuid.uuid4().hex}"
        return {
            "request_id": request_id,
            "priority": self.config.priority,
            "lora_request": self._adapter(),
        }

    def _adapter(self) -> Any:
        name = self.config.adapter
        if name is None:
            return None
        adapters = getattr(self.renderer.serving_models, "lora_requests", {})
        if name not in adapters:
            raise LocalizerError(f"LoRA adapter {name!r} is not loaded")
        return adapters[name]

    @contextmanager
    def _own(self, prompt: Any) -> Iterator[None]:
        """Say that a prompt is the localizer's own; what the engine never got of it is not in its cache."""
        unsent = prompt[LOCALIZERS_OWN] = newly_sent(prompt)
        try:
            yield
        finally:
            if (cache := self.renderer.mm_processor_cache) is not None:
                for mm_hash in unsent:
                    cache.invalidate(mm_hash)

    def _read(self, output: Any, glance: _Glance) -> LocalizerAnswer:
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


def _extras(glance: _Glance, salt: str | None) -> dict[str, Any]:
    """What is asked for the image, whatever limits clients have. The salt also keeps blocks apart."""
    asked = {"mm_processor_kwargs": {REQUEST_KEY: replace(glance.request, salt=salt)}}
    return asked if salt is None else {**asked, "cache_salt": salt}


class ServingEngine:
    """An AsyncLLM (vllm/v1/engine/async_llm.py)."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def generate(self, prompt: Any, sampling: Any, options: Mapping[str, Any]) -> Any:
        """The finished output. If the caller is cancelled, vLLM aborts the request."""
        outputs = [output async for output in self.engine.generate(prompt, sampling, **options)]
        if not outputs or not outputs[-1].outputs:
            raise LocalizerError("the engine gave no answer")
        return outputs[-1]


class OfflineEngine:
    """An LLMEngine (vllm/v1/engine/llm_engine.py), stepped from here while the localizer's request runs.

    Outputs of other requests that come meanwhile are kept for whoever steps the engine next.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._step, self._has_unfinished = engine.step, engine.has_unfinished_requests
        self._kept: list[Any] = []
        engine.step, engine.has_unfinished_requests = self._step_with_kept, self._has_more

    def generate(self, prompt: Any, sampling: Any, options: Mapping[str, Any]) -> Any:
        """The finished output."""
        request_id = self.engine.add_request(params=sampling, prompt=prompt, **options)
        try:
            while self._has_unfinished():
                for output in self._step():
                    if output.request_id != options["request_id"]:
                        self._kept.append(output)
                    elif output.finished:
                        return output
        except BaseException:
            self.engine.abort_request([request_id], internal=True)
            raise
        raise LocalizerError("the engine gave no answer")

    def _step_with_kept(self) -> list[Any]:
        kept, self._kept = self._kept, []
        return kept or list(self._step())

    def _has_more(self) -> bool:
        return bool(self._kept) or bool(self._has_unfinished())
