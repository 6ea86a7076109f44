# SPDX-License-Identifier: Apache-2.0
"""Shadow checks: what pruning does to the answers of this server's own requests, for its metrics alone.

A share of the pruned requests is drawn. When the client has got all of its answer, the prompt goes to the
engine twice more, unpruned and as it was pruned, each for the likeliest first token and its neighbours. So
what is compared does not depend on how the client samples, and nothing of its answer is looked at.
"""

import asyncio
import logging
import math
import random
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_crop.config import ShadowConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.frontend.metrics import ShadowOutcome, crop_metrics
from vllm_crop.frontend.own_request import ServingEngine, servers_own
from vllm_crop.frontend.request_context import FACTS, ImageFacts, RequestContext
from vllm_crop.localizers.failures import ThrottledLog
from vllm_crop.localizers.thumbnails import as_picture
from vllm_crop.models.processor import AHEAD_KEY, CROP_KEY, REQUEST_KEY
from vllm_crop.request import CropRequest

LAST = sys.maxsize  # of vLLM's 64-bit priorities: lower is earlier
MOST_LOGPROBS = 20  # vLLM's own default for --max-logprobs
logger = logging.getLogger("vllm.plugins.crop")


@dataclass(frozen=True)
class FirstToken:
    """The likeliest first token of an answer.

    Attributes:
        logprobs: in nats by token id, of the likeliest few.
    """

    token_id: int
    logprobs: Mapping[int, float]

    @classmethod
    def of(cls, output: Any) -> "FirstToken":
        """Read an engine's output (vllm/outputs.py)."""
        answer = output.outputs[0]
        return cls(answer.token_ids[0], {token: one.logprob for token, one in answer.logprobs[0].items()})


def nats_lost(unpruned: FirstToken, pruned: FirstToken) -> float:
    """Log-probability that pruning takes from the unpruned model's first token; negative if it gives some.

    Where that token is not among the likeliest few of the pruned model it is at most as likely as the last of
    them, and what is returned is the least that is lost.

    Raises:
        ValueError: one of them is no number: a model gone wrong, or a token that is ruled out.
    """
    token = unpruned.token_id
    lost = unpruned.logprobs[token] - pruned.logprobs.get(token, min(pruned.logprobs.values()))
    if not math.isfinite(lost):
        raise ValueError(f"log-probabilities of token {token} cannot be compared")
    return lost


@dataclass(frozen=True)
class Shadow:
    """What it takes to ask about a request again.

    Attributes:
        prompt: as vLLM's renderer had it before its images were expanded.
        asked: how it was pruned.
        lora: the adapter the client chose, None for the model itself.
    """

    prompt: Mapping[str, Any]
    asked: CropRequest
    lora: Any


class ShadowChecks:
    """Draws requests, holds them until they are answered, checks a few at once, drops the others.

    Nothing of it raises: clients must not notice.
    """

    def __init__(
        self,
        renderer: Any,
        engine: ServingEngine,
        config: ShadowConfig,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`renderer`: the server's CropRenderer; `draw`: a number in [0, 1) for each pruned request."""
        self.renderer, self.engine, self.config, self._draw = renderer, engine, config, draw
        model = renderer.model_config
        self.model_name: str = model.served_model_name
        most = MOST_LOGPROBS if model.max_logprobs < 0 else min(MOST_LOGPROBS, model.max_logprobs)
        self.sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=most,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.log = ThrottledLog(logger)
        self._held = 0
        self._slots = asyncio.Semaphore(config.max_running)
        self._tasks: set[asyncio.Task[None]] = set()
        crop_metrics().begin_shadow_checks(self.model_name)
        if renderer.config.scheduler_config.policy != "priority":
            logger.warning(
                "Shadow checks take their turn in the engine like any request; with --scheduling-policy "
                "priority they come last"
            )

    def consider(
        self,
        prompt: Mapping[str, Any],
        asked: CropRequest,
        engine_input: Mapping[str, Any],
        context: RequestContext,
    ) -> None:
        """Draw an HTTP request that has been rendered; if it is checked, that begins when it is answered.

        Args:
            prompt: as vLLM's renderer had it before its images were expanded.
            asked: how they were pruned.
            engine_input: what came of it.
        """
        try:
            facts: Sequence[ImageFacts] = engine_input.get(FACTS, ())
            pruned = context.model_name is not None and any(one.pruned for one in facts)
            if not pruned or self._draw() >= self.config.rate or not _can_be_asked_again(prompt, context):
                return
            removed = sum(one.tokens - one.tokens_after_plc for one in facts)
            if len(engine_input["prompt_token_ids"]) + removed >= self.renderer.model_config.max_model_len:
                self._count("too_long")
            elif self._held >= self.config.max_held:
                self._count("dropped")
            else:
                adapters = getattr(self.renderer.serving_models, "lora_requests", {})
                lora = adapters.get(getattr(context.request, "model", None))
                shadow = Shadow(_plain(prompt), replace(asked, limited=False, unsure=False), lora)
                context.afterwards.append(partial(self._over, shadow))
                self._held += 1
        except Exception:
            self._failed()

    def stop(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()

    def _over(self, shadow: Shadow, answered: bool) -> None:
        """The request is over; what was not answered in full is not checked."""
        try:
            if not answered:
                self._held -= 1
                return
            # In a context of its own: the check is nobody's request.
            task = asyncio.get_running_loop().create_task(self._check(shadow), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._done)
        except Exception:
            self._held -= 1
            self._failed()

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._held -= 1

    async def _check(self, shadow: Shadow) -> None:
        try:
            async with self._slots:
                off = CropRequest(CropParams(method="off"), limited=False, salt=shadow.asked.salt)
                unpruned = await self._first_token(shadow, off)
                pruned = await self._first_token(shadow, shadow.asked)
            same = unpruned.token_id == pruned.token_id
            crop_metrics().record_agreement(self.model_name, same, nats_lost(unpruned, pruned))
            self._count("compared")
        except TimeoutError:
            self._count("timeout")
        except Exception:
            self._failed()

    async def _first_token(self, shadow: Shadow, asked: CropRequest) -> FirstToken:
        """What is likeliest if the images are pruned as asked.

        Raises:
            Exception: whatever is in the way; TimeoutError if the engine takes too long.
        """
        settings = {**shadow.prompt["mm_processor_kwargs"], REQUEST_KEY: asked}
        prompt = {**shadow.prompt, "mm_processor_kwargs": settings}
        # Not under the time limit: from here to the engine its images are in vLLM's cache as if they had
        # been sent, and whoever renders meanwhile relies on it.
        engine_input = await self.renderer.process_for_engine_async(prompt, time.time())
        options = {
            "request_id": f"crop-shadow-{uuid.uuid4().hex}",
            "priority": LAST,
            "lora_request": shadow.lora,
        }
        with servers_own(engine_input, self.renderer.mm_processor_cache):
            async with asyncio.timeout(self.config.timeout_s):
                return FirstToken.of(await self.engine.generate(engine_input, self.sampling, options))

    def _count(self, outcome: ShadowOutcome) -> None:
        crop_metrics().record_shadow_check(self.model_name, outcome)

    def _failed(self) -> None:
        """Note the exception at hand."""
        self.log.warning("failed", "A shadow check failed; no client notices", traceback=True)
        self._count("failed")


def _can_be_asked_again(prompt: Mapping[str, Any], context: RequestContext) -> bool:
    """Whether the prompt says all: images are there, and nothing is cut after they have been expanded."""
    request = context.request
    if context.ended or getattr(request, "background", False):  # answered when nobody waits any more
        return False
    if getattr(request, "truncate_prompt_tokens", None) is not None:
        return False
    images = (prompt.get("multi_modal_data") or {}).get("image")
    images = images if isinstance(images, list | tuple) else [images]
    return all(image is not None and as_picture(image) is not None for image in images)


def _plain(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt without what was the request's alone.

    A name (`uuid`) means the image last sent with it, so it must not be said again later.
    """
    settings = prompt.get("mm_processor_kwargs") or {}
    kept = {name: value for name, value in settings.items() if name not in (AHEAD_KEY, CROP_KEY, REQUEST_KEY)}
    return {
        **{name: value for name, value in prompt.items() if name != "multi_modal_uuids"},
        "mm_processor_kwargs": kept,
    }
