# SPDX-License-Identifier: Apache-2.0
"""A model that is asked where it looks: an engine of its own, watched in all its layers."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from vllm.exceptions import VLLMError

from vllm_crop.calibrating.scoring import window_around
from vllm_crop.errors import CropError
from vllm_crop.frontend.attention_localizer import AttentionLocalizer, Rule
from vllm_crop.frontend.engine_localizer import EngineLocalizer
from vllm_crop.localizers.base import LocalizerAnswer, LocalizerError, UnreadableAnswerError
from vllm_crop.localizers.dialects import DialectName
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.localizers.thumbnails import Picture
from vllm_crop.planning.geometry import Box, ImageView, Region

_AT_ONCE = 32  # requests: enough to fill steps, few enough for small KV caches


class CalibrationEngineError(CropError):
    """The model could not be started or asked."""


@dataclass(frozen=True)
class Look:
    """What came of one request.

    Attributes:
        map: `[rows, cols]`, the heat; empty where there is none.
        shows: the part of the picture that the map is over; None without one.
        window: of a fixed size around the hottest cell or the named place, in fractions of the picture; None
            if no place was found.
        region: what a server would prune by.
        seconds: from picture and question to the region.
    """

    map: NDArray[np.float64]
    window: Box | None
    region: Region | None
    confidence: float
    seconds: float
    shows: ImageView | None = None


class LookingModel:
    """Asks a running engine where it looks, or where it says that something is."""

    def __init__(self, engine: Any, config: LocalizerConfig) -> None:
        """`engine`: an AsyncLLM that watches `config.layers`."""
        self._renderer, self._config = engine.renderer, config
        self._geometry = engine.renderer.mm_processor.geometry
        self._slots = asyncio.Semaphore(_AT_ONCE)

    @property
    def model(self) -> dict[str, Any]:
        """The configuration of the checkpoint, defaults included."""
        found: dict[str, Any] = self._renderer.model_config.hf_config.to_dict()
        return found

    def view_tokens(self, size: tuple[int, int], thumbnail_tokens: int | None = None) -> int:
        """Most visual tokens of the view of a picture of this size; the configured view's if left out."""
        full: int = self._geometry.grid(*size).num_tokens
        return min(full, thumbnail_tokens or self._config.view_tokens(full))

    async def look(
        self, picture: Image.Image, question: str, rule: Rule, thumbnail_tokens: int | None = None
    ) -> Look:
        """Where layers look together; another size of view than the configured one may be named."""
        config = self._config
        if thumbnail_tokens is not None:
            config = config.model_copy(update={"thumbnail_tokens": thumbnail_tokens})
        localizer = AttentionLocalizer(self._renderer, self._geometry, config)
        async with self._slots:
            start = time.perf_counter()
            try:
                answer = await localizer.look(Picture(lambda: picture), question, rule)
            except UnreadableAnswerError:
                return _nothing(start)
            return _look(answer, time.perf_counter() - start)

    async def say(
        self, picture: Image.Image, question: str, dialect: DialectName, prompt: str | None
    ) -> Look:
        """Where the model says that it is, in a dialect; "whole" is no place."""
        config = LocalizerConfig(kind="engine", dialect=dialect, prompt=prompt)
        localizer = EngineLocalizer(self._renderer, self._geometry, config)
        start = time.perf_counter()
        try:
            answer = await localizer.locate(Picture(lambda: picture), question)
        except UnreadableAnswerError:
            return _nothing(start)
        return _look(answer, time.perf_counter() - start)


@asynccontextmanager
async def looking_model(
    model: str, config: LocalizerConfig, serve_args: Sequence[str]
) -> AsyncIterator[LookingModel]:
    """Start an engine in this process that watches `config.layers`, until the block ends.

    Args:
        serve_args: more options, as of `vllm serve`.

    Raises:
        CalibrationEngineError: it did not start, or did not answer.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="--serve-args"))
    crop = LocalizerConfig.model_dump_json(config, exclude_unset=True)
    options = [
        "--model",
        model,
        "--disable-log-stats",
        *serve_args,
        "--crop-config",
        f'{{"localizer": {crop}}}',
    ]
    try:
        parsed = parser.parse_args(options)
    except SystemExit:
        raise CalibrationEngineError("--serve-args are no options of vllm serve, as said above") from None
    try:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parsed))
    except CropError:
        raise
    except Exception as error:  # whatever vLLM raises: its own log has said more
        reason = str(error).strip().split("\n")[0]
        raise CalibrationEngineError(
            f"{model} did not start: {reason}. What vLLM says stands above; options for it, such as "
            "--max-model-len or --gpu-memory-utilization, go into --serve-args"
        ) from None
    try:
        yield LookingModel(engine, config)
    except (VLLMError, LocalizerError) as error:
        raise CalibrationEngineError(
            f"{model} could not be asked: {' '.join(str(error).split())}. Options for the engine go into "
            "--serve-args"
        ) from None
    finally:
        engine.shutdown()


def _nothing(start: float) -> Look:
    return Look(np.zeros((0, 0)), None, None, 0.0, time.perf_counter() - start)


def _look(answer: LocalizerAnswer, seconds: float) -> Look:
    confidence = 1.0 if answer.confidence is None else answer.confidence
    heat: NDArray[np.float64] = np.zeros((0, 0))
    if answer.heat is None:
        middle = None if answer.region is None else _middle(answer.region.boxes[0])
    else:
        heat = answer.heat.values
        row, col = divmod(int(heat.argmax()), heat.shape[1])
        x, y = (col + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]
        assert answer.shows is not None
        shown = answer.shows.window
        middle = shown.x0 + x * (shown.x1 - shown.x0), shown.y0 + y * (shown.y1 - shown.y0)
    window = None if middle is None else window_around(*middle)
    return Look(heat, window, answer.region, confidence, seconds, answer.shows)


def _middle(box: Box) -> tuple[float, float]:
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
