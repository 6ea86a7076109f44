# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process: what a server would answer, without HTTP."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from lab.evaluation.asking import Answer, Asked, SceneTask, ask
from lab.evaluation.conditions import LOCATE, Condition
from lab.evaluation.served.accounting import Accounting

# Prefix caching would answer parts of later questions about an image, and its first token earlier.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "limit_mm_per_prompt": {"image": 2},
    "kv_cache_memory_bytes": 1 << 30,
    "seed": 0,
}


class EngineAnswers:
    """An Answerer on `vllm.LLM`; `crop` are the plugin's settings, None for stock vLLM."""

    name = "vllm"

    def __init__(self, accounting: Accounting, crop: Mapping[str, Any] | None) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self.accounting = accounting
        additional = {} if crop is None else {"additional_config": {"crop": dict(crop)}}
        self.llm: Any = LLM(model=accounting.model, **ENGINE, **additional)

    def answer(self, condition: Condition, tasks: Sequence[SceneTask]) -> list[list[Answer]]:
        """Per scene and question; all of them in flight at once."""
        asked = [ask(condition, task, self.accounting.resize) for task in tasks]
        flat = list(chain.from_iterable(asked))
        self.accounting.check(flat)
        outputs = iter(self._generate(flat, logprobs=0 if condition.method == LOCATE else None))
        return [[self._answer(one, next(outputs)) for one in questions] for questions in asked]

    def first_token_ms(self, condition: Condition, task: SceneTask) -> float:
        """To the first token, of the localizer to the last; without HTTP."""
        (first, *_) = ask(condition, task, self.accounting.resize)
        timed = first if condition.method == LOCATE else replace(first, steps=1)
        start = time.perf_counter()
        self._generate([timed])
        return 1e3 * (time.perf_counter() - start)

    def _generate(self, asked: Sequence[Asked], logprobs: int | None = None) -> list[Any]:
        from vllm import SamplingParams

        sampling = [SamplingParams(temperature=0, max_tokens=one.steps, logprobs=logprobs) for one in asked]
        prompts = [self._prompt(one) for one in asked]
        return list(self.llm.generate(prompts, sampling, use_tqdm=False))

    def _prompt(self, asked: Asked) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": self.accounting.prompt(asked)}
        if asked.images:
            prompt["multi_modal_data"] = {"image": list(asked.images)}
        if asked.crop is not None:
            prompt["mm_processor_kwargs"] = {"crop": asked.crop}
        return prompt

    def _answer(self, asked: Asked, output: Any) -> Answer:
        said = output.outputs[0]
        counts = len(output.prompt_token_ids), len(said.token_ids)
        answer = self.accounting.answer(asked, said.text, *counts)
        logprob = said.cumulative_logprob
        return answer if logprob is None else replace(answer, confidence=math.exp(logprob))
