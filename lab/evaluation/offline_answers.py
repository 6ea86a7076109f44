# SPDX-License-Identifier: Apache-2.0
"""tinyvqa in this process, for studies that ask the same questions in many ways."""

import os
from collections.abc import Sequence
from typing import Any

from lab.evaluation.rim_regions import Asked
from vllm_crop.crop_params import CropParams
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.measuring.shares import Estimate
from vllm_crop.request import CropRequest

LOCAL = ("read", "relation", "compare")  # families of questions of which a region holds the answer
ANSWER_TOKENS = 4
UNPRUNED = CropRequest(CropParams(method="off"), limited=False)


class OfflineAnswers:
    """Answers questions offline, all of a call at once.

    Attributes:
        llm: the engine.
        localizer: what it is looked with.
    """

    def __init__(self, eviction_layer: int, **crop: Any) -> None:
        """`crop`: more of the plugin's settings."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from transformers import AutoProcessor
        from vllm import LLM

        from lab.demo.setting import LOCALIZER, MODEL
        from lab.evaluation.served.offline import ENGINE

        settings = {"position_ids": "original", "localizer": LOCALIZER, "eviction_layers": [eviction_layer]}
        # The same picture in many ways: little of it is asked for twice.
        self.llm: Any = LLM(
            model=str(MODEL),
            **ENGINE,
            mm_processor_cache_gb=0.25,
            additional_config={"crop": settings | crop},
        )
        self.localizer = LocalizerConfig.model_validate(LOCALIZER)
        self._processor = AutoProcessor.from_pretrained(MODEL)

    def __call__(self, asked: Sequence[Asked], crops: Sequence[CropRequest]) -> list[bool]:
        """Whether each question is answered right, with what is asked for its image."""
        from vllm import SamplingParams

        from vllm_crop.models.processor import REQUEST_KEY

        pictures = {scene.scene.seed: scene.picture() for scene, _ in asked}
        prompts = [
            {
                "prompt": self._prompt(question.text),
                "multi_modal_data": {"image": [pictures[scene.scene.seed]]},
                "mm_processor_kwargs": {REQUEST_KEY: crop},
            }
            for (scene, question), crop in zip(asked, crops, strict=True)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [
            output.outputs[0].text.strip() == question.answer
            for output, (_, question) in zip(outputs, asked, strict=True)
        ]

    def _prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def shown(share: Estimate) -> str:
    """In percent, with the interval."""
    return f"{100 * share.value:.1f} ({100 * share.low:.0f}-{100 * share.high:.0f})"
