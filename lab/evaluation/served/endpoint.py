# SPDX-License-Identifier: Apache-2.0
"""Any OpenAI-compatible server that serves the checkpoint; with the plugin, if CROP is to be measured."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from lab.evaluation.asking import Answer, Asked, SceneTask, ask
from lab.evaluation.conditions import LOCATE, Condition
from lab.evaluation.served.accounting import Accounting
from vllm_crop.client import CropClient, facts_of
from vllm_crop.errors import CropError

IN_FLIGHT = 16


class EndpointError(CropError):
    """The endpoint did not answer."""


class EndpointAnswers:
    """An Answerer over HTTP."""

    name = "endpoint"

    def __init__(self, accounting: Accounting, base_url: str) -> None:
        from openai import OpenAIError

        self.accounting, self.base_url = accounting, base_url
        self.client = CropClient(base_url, max_retries=2)
        try:
            self.served = self.client.model
        except (OpenAIError, IndexError) as error:
            raise EndpointError(
                f"{base_url} does not answer as an OpenAI-compatible server ({error}): is it up, and does "
                "the address end in /v1?"
            ) from None

    def answer(self, condition: Condition, tasks: Sequence[SceneTask]) -> list[list[Answer]]:
        """Per scene and question, several in flight."""
        asked = [ask(condition, task, self.accounting.resize) for task in tasks]
        self.accounting.check(list(chain.from_iterable(asked)))
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            answer = partial(self._answer, logprobs=condition.method == LOCATE)
            answers = iter(list(pool.map(answer, chain.from_iterable(asked))))
        return [[next(answers) for _ in questions] for questions in asked]

    def first_token_ms(self, condition: Condition, task: SceneTask) -> float:
        """To the first streamed token, of the localizer to the last."""
        (first, *_) = ask(condition, task, self.accounting.resize)
        start = time.perf_counter()
        with self._complete(first, stream=True).parse() as stream:
            chunks = (chunk for chunk in stream if chunk.choices)
            deque(chunks, maxlen=0) if condition.method == LOCATE else next(chunks)
        return 1e3 * (time.perf_counter() - start)

    def _answer(self, asked: Asked, logprobs: bool) -> Answer:
        raw = self._complete(asked, **({"logprobs": True} if logprobs else {}))
        response = raw.parse()
        if asked.crop is not None and "regions" not in asked.crop:
            asked = replace(asked, crop={**asked.crop, "regions": [_found(raw.headers)]})
        choice = response.choices[0]
        counts = response.usage.prompt_tokens, response.usage.completion_tokens
        answer = self.accounting.answer(asked, choice.message.content or "", *counts)
        if not logprobs:
            return answer
        return replace(answer, confidence=math.exp(sum(token.logprob for token in choice.logprobs.content)))

    def _complete(self, asked: Asked, **options: Any) -> Any:
        from openai import OpenAIError

        # A server that finds regions itself would prune what is to be answered unpruned.
        unpruned = None if self.accounting.config is None else {"method": "off"}
        crop = unpruned if asked.crop is None else asked.crop
        try:
            return self.client.send(asked.images, asked.text, crop, max_tokens=asked.steps, **options)
        except OpenAIError as error:
            hint = " Does it run with --plugin crop?" if asked.crop else ""
            raise EndpointError(f"{self.base_url} refused a question: {error}.{hint}") from None


def _found(headers: Mapping[str, str]) -> list[list[float]] | None:
    """The region that the server has found, None where it served the image whole."""
    facts = facts_of(headers)
    (image,) = facts["images"] if facts else ({},)
    if "localizer" not in image:
        raise EndpointError("the server finds no regions: start it with a localizer in --crop-config")
    region: list[list[float]] | None = image["region"]
    return region
