# SPDX-License-Identifier: Apache-2.0
"""The engine behind a renderer, as the localizer asks it: in a server, or in an offline `LLM`."""

from collections.abc import Mapping
from typing import Any

from vllm_crop.localizers.base import LocalizerError


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
