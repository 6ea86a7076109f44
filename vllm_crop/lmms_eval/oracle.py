# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's model `vllm_generate`, told where the answer to each document's question stands."""

from typing import Any

from lmms_eval.models.chat.vllm_generate import VLLMGenerate

from vllm_crop.config import CONFIG_KEY
from vllm_crop.errors import CropError, InvalidConfigError


class NoBoxesError(CropError):
    """A task's documents do not say where their answers stand."""


class CropOracle(VLLMGenerate):
    """Sends the boxes of each document as the region of its image.

    A document without boxes, with an empty list or None, is served whole, whatever the settings say of
    localizers.
    """

    def __init__(self, *args: Any, boxes: str = "boxes", **kwargs: Any) -> None:
        """Start the engine.

        Args:
            boxes: the field of the documents: a box `[x0, y0, x1, y1]` or a list of boxes, fractions of the
                picture.
            args, kwargs: of lmms-eval's `vllm_generate`, and of `vllm.LLM`.

        Raises:
            InvalidConfigError: `additional_config` has no settings of ours: no model would know what to do
                with regions.
        """
        # A mapping, or the JSON that lmms-eval makes one of later on.
        if CONFIG_KEY not in kwargs.get("additional_config", ()):
            raise InvalidConfigError(
                "crop_oracle prunes, and needs settings for it: add "
                """additional_config={"crop": {"pruning_rate": 0.778}} to --model_args"""
            )
        self.boxes = boxes
        super().__init__(*args, **kwargs)

    def make_one_request(self, request: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The prompt with its region, and the sampling parameters.

        Raises:
            NoBoxesError: the task's documents have no such field.
        """
        *_, doc_id, task, split = request.arguments
        document = self.task_dict[task][split][doc_id]
        if self.boxes not in document:
            raise NoBoxesError(
                f"the documents of {task} have no field {self.boxes!r} to say where answers stand, only "
                f"{', '.join(document)}: name the field with boxes=FIELD in --model_args, if there is one"
            )
        prompt, sampling = super().make_one_request(request)
        crop = {"regions": [document[self.boxes] or None], "localize": "off"}
        prompt["mm_processor_kwargs"] = {**prompt.get("mm_processor_kwargs", {}), CONFIG_KEY: crop}
        return prompt, sampling
