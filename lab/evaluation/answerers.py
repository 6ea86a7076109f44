# SPDX-License-Identifier: Apache-2.0
"""Who answers which condition. Each is started when its first unfinished condition comes, and only then."""

from functools import cached_property
from typing import TYPE_CHECKING

from lab.evaluation.asking import Answerer
from lab.evaluation.conditions import Condition
from lab.evaluation.options import Options
from lab.evaluation.served.accounting import Accounting
from lab.evaluation.times import Timed
from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError, UnsupportedModelError
from vllm_crop.families.qwen_vl import SmartResize

if TYPE_CHECKING:
    from lab.evaluation.served.endpoint import EndpointAnswers
    from lab.evaluation.served.offline import EngineAnswers


class Answerers:
    """The answerers of one run."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, condition: Condition) -> Answerer:
        """Who answers a condition.

        Raises:
            CropError: it cannot be started; the message says what to do.
        """
        name = self.options.engine_for(condition)
        if name == "transformers":
            return self._transformers
        return self._endpoint if name == "endpoint" else self._engine

    def timed(self, condition: Condition) -> Timed:
        """Who answers a condition that is served, for its times."""
        return self._endpoint if self.options.engine_for(condition) == "endpoint" else self._engine

    @cached_property
    def _transformers(self) -> Answerer:
        from lab.evaluation.transformers_answers import TransformersAnswers

        return TransformersAnswers(self.options.model, self.options.eviction_layers)

    @cached_property
    def _engine(self) -> "EngineAnswers":
        from lab.evaluation.served.offline import EngineAnswers

        crop = self.options.crop_settings() if self.options.prunes else None
        return EngineAnswers(self._accounting(), crop)

    @cached_property
    def _endpoint(self) -> "EndpointAnswers":
        from lab.evaluation.served.endpoint import EndpointAnswers

        assert self.options.base_url is not None
        return EndpointAnswers(self._accounting(), self.options.base_url)

    def _accounting(self) -> Accounting:
        from transformers import AutoProcessor

        from vllm_crop.families.checkpoint import load_geometry

        model, config = str(self.options.model), None
        if self.options.prunes:
            try:
                load_geometry(model)
            except UnsupportedModelError as error:
                raise CropError(f"{error}. On transformers it works: add --engine transformers") from None
            config = CropConfig.from_mapping(self.options.crop_settings())
        processor = AutoProcessor.from_pretrained(model)
        resize = SmartResize.of_processor(processor.image_processor)
        return Accounting(model, processor, resize, config)
