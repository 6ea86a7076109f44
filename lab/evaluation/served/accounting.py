# SPDX-License-Identifier: Apache-2.0
"""What a served question must take: from the plan, checked against what the engine counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from lab.evaluation.asking import Answer, Asked
from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.errors import CropError
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.families.qwen_vl import SmartResize
from vllm_crop.planner import Planner
from vllm_crop.planning.geometry import Region
from vllm_crop.request import image_requests

_geometry = cache(load_geometry)  # reads files


class CountError(CropError):
    """The engine ran with another number of tokens than the plan says."""


@dataclass(frozen=True)
class Accounting:
    """Counts tokens by the server's own functions.

    Attributes:
        config: the server's settings; None where it has no plugin.
    """

    model: str
    processor: Any
    resize: SmartResize
    config: CropConfig | None

    def prompt(self, asked: Asked) -> str:
        """The prompt by the checkpoint's chat template."""
        content = [{"type": "image"} for _ in asked.images] + [{"type": "text", "text": asked.text}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def check(self, asked: Sequence[Asked]) -> None:
        """Refuse what the server would refuse, before anything is sent.

        Raises:
            InvalidCropError: the method cannot meet the pruning rate; that depends on no region.
        """
        pruned = (one for one in asked if one.crop is not None)
        for one in islice(pruned, 1):
            self._visual(replace(one, crop={"regions": [Region.whole().as_lists()], **(one.crop or {})}))

    def answer(self, asked: Asked, text: str, prompt_tokens: int, steps: int | None = None) -> Answer:
        """An answer with what it took.

        Raises:
            CountError: the prompt is longer or shorter than planned.
        """
        received, average = self._visual(asked)
        words = self.processor.tokenizer.encode(self.prompt(asked), add_special_tokens=False)
        others = len(words) - len(asked.images)
        if prompt_tokens != received + others:
            raise CountError(
                f"{prompt_tokens} prompt tokens were counted for {asked.crop or 'an unpruned question'}, "
                f"planned are {received} visual ones and {others} others"
            )
        return Answer(text.strip(), average, average + others, prompt_tokens, steps=steps)

    def _visual(self, asked: Asked) -> tuple[int, float]:
        """Visual tokens in the prompt, and averaged over layers."""
        full = sum(self.resize.grid(*image.size).num_tokens for image in asked.images)
        if asked.crop is None:
            return full, full
        assert self.config is not None, "only a server with the plugin prunes"
        (image,) = asked.images
        (request,) = image_requests(CropParams.parse(asked.crop), self.config, 1)
        geometry = _geometry(self.model)
        plan = Planner(self.config, geometry).plan_image(request, image.width, image.height).tokens
        return plan.num_embeddings, sum(plan.tokens_per_layer(geometry.num_layers)) / geometry.num_layers
