# SPDX-License-Identifier: Apache-2.0
"""One more request of the served model, with a view of an image: what it is shown, and how it gets there."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vllm.renderers.params import ChatParams

from vllm_crop.crop_params import CropParams
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.families.view_size import size_for_tokens
from vllm_crop.frontend.settling import SERVERS_OWN
from vllm_crop.localizers.base import LocalizerError
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture, image_of, not_huge, off_the_loop
from vllm_crop.models.processor import REQUEST_KEY, WAY_KEY
from vllm_crop.models.sent import OnTheWay, newly_sent
from vllm_crop.planning.geometry import ImageView, Region
from vllm_crop.request import CropRequest


@dataclass(frozen=True)
class Glance:
    """What the model is shown, and what is done with its tokens.

    Attributes:
        item: a picture of the same aspect as the image, or the image itself, as vLLM takes it.
        size: of that picture, width and height.
        shows: the part of it that the model sees.
        pixels: width and height of that part, as the model is shown it.
    """

    item: Any
    size: tuple[int, int]
    request: CropRequest
    shows: ImageView
    pixels: tuple[int, int]


class OwnRequests:
    """Asks the server's own engine, past all limits that clients have."""

    def __init__(self, renderer: Any, geometry: VisionGeometry, config: LocalizerConfig) -> None:
        """`renderer`: the server's CropRenderer, whose `engine` answers."""
        self.renderer, self.geometry, self.config = renderer, geometry, config

    async def glance(self, picture: Picture) -> Glance:
        """A view of the picture, made beside the event loop."""
        return await off_the_loop(self.glance_now, picture)

    async def ask(
        self, glance: Glance, text: str, sampling: Any, salt: str | None, waiting: Callable[[], None]
    ) -> Any:
        """The engine's output (vllm/outputs.py); cancelling this aborts the request.

        Args:
            waiting: called when the request is on its way to the engine.
        """
        engine, options = self._engine(ServingEngine), self._options()
        way = OnTheWay()
        try:
            _, prompts = await self.renderer.render_chat_async(
                [_messages(glance, text)], self._chat_params(), prompt_extras=_extras(glance, salt, way)
            )
        except BaseException:  # its time is over, or nobody waits any more: at any point
            way.give_up()
            raise
        with servers_own(prompts[0], self.renderer.mm_processor_cache):
            waiting()
            return await engine.generate(prompts[0], sampling, options)

    def ask_now(self, glance: Glance, text: str, sampling: Any, salt: str | None) -> Any:
        """The same for the offline `LLM`, whose other requests wait meanwhile."""
        engine, options = self._engine(OfflineEngine), self._options()
        _, prompts = self.renderer.render_chat(
            [_messages(glance, text)], self._chat_params(), prompt_extras=_extras(glance, salt)
        )
        with servers_own(prompts[0], self.renderer.mm_processor_cache):
            return engine.generate(prompts[0], sampling, options)

    def glance_now(self, picture: Picture) -> Glance:
        """A view of the picture with about as many tokens as the settings say."""
        sent = picture.open_item()
        image = image_of(sent)
        most = self.config.view_tokens(self.geometry.grid(*image.size).num_tokens)
        size = size_for_tokens(self.geometry, *image.size, most)
        if size is not None:
            view = image if size == image.size else picture.shrunk(size, image)
            asked = CropParams(method="off")
        else:
            # Every image costs the same here: keep an even sample of its tokens instead.
            view = not_huge(image)
            full = self.geometry.grid(*view.size).num_tokens
            asked = CropParams(regions=[Region.whole()], pruning_rate=1 - most / full, method="plc")
        request = CropRequest(asked, limited=False, overview=True)
        # The image itself goes as it came, so that the vision tower runs once for it and for the view.
        item = sent if view is image else view
        shows, pixels = self.geometry.view(*view.size), self.geometry.pixels(*view.size)
        return Glance(item, view.size, request, shows, pixels)

    def _engine(self, kind: type) -> Any:
        engine = self.renderer.engine
        if not isinstance(engine, kind):
            raise LocalizerError("this process has no engine to ask")
        return engine

    def _chat_params(self) -> ChatParams:
        given = {"add_generation_prompt": True, "tokenize": False, **self.config.chat_template_kwargs}
        return ChatParams(chat_template=self.renderer.chat_template, chat_template_kwargs=given)

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
def servers_own(prompt: Any, cache: Any) -> Iterator[None]:
    """Say that an engine's input is the server's own; what the engine never got of it is not in the cache.

    Args:
        cache: vLLM's processor cache, None without one.
    """
    unsent = prompt[SERVERS_OWN] = newly_sent(prompt)
    try:
        yield
    finally:
        if cache is not None:
            for mm_hash in unsent:
                cache.invalidate(mm_hash)


def _messages(glance: Glance, text: str) -> list[Any]:
    image = {"type": "image_pil", "image_pil": glance.item}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def _extras(glance: Glance, salt: str | None, way: OnTheWay | None = None) -> dict[str, Any]:
    """What is asked for the image, whatever limits clients have. The salt also keeps blocks apart."""
    settings = {REQUEST_KEY: replace(glance.request, salt=salt), **({} if way is None else {WAY_KEY: way})}
    asked: dict[str, Any] = {"mm_processor_kwargs": settings}
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
                answer = None
                for output in self._step():
                    if output.request_id != options["request_id"]:
                        self._kept.append(output)
                    elif output.finished:
                        answer = output
                if answer is not None:
                    return answer
        except BaseException:
            self.engine.abort_request([request_id], internal=True)
            raise
        raise LocalizerError("the engine gave no answer")

    def _step_with_kept(self) -> list[Any]:
        kept, self._kept = self._kept, []
        return kept or list(self._step())

    def _has_more(self) -> bool:
        return bool(self._kept) or bool(self._has_unfinished())
