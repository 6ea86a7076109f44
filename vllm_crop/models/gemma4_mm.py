# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 with a budget for each image, over vllm/model_executor/models/gemma4_mm.py.

Upstream has one budget for all images of a request. Which one an image has is known by its pixels alone, so
the model is the stock one: nothing is compressed in it, and its embeddings are those of that budget.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from vllm.model_executor.models import gemma4_mm as stock
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import MultiModalDataItems

from vllm_crop.families.gemma4 import Gemma4Geometry
from vllm_crop.models.processor import CropItems, CropProcessorMixin

PIXELS = ("pixel_values", "pixel_position_ids")


class Gemma4MultiModalProcessor(CropProcessorMixin, stock.Gemma4MultiModalProcessor):
    """The stock processor, called once for each budget."""

    beside_image = 2  # what begins and what ends it

    def can_be_foveated(self, is_picture: bool) -> bool:
        """Any image can be seen small: the image processor does it."""
        return True

    def images_processed(self, mm_items: Any, hf_kwargs: Mapping[str, object], items: CropItems) -> Any:
        """As the stock processor, the pixels of images of several budgets in a list."""
        by_budget: dict[int | None, list[int]] = {None: []}
        for index, budget in enumerate(self._budgets(mm_items["image"], items)):
            by_budget.setdefault(budget, []).append(index)
        if len(by_budget) == 1:
            return super().images_processed(mm_items, hf_kwargs, items)
        others = {name: data for name, data in mm_items.items() if name != "image"}
        images = [mm_items["image"].get(index) for index in range(len(items.decisions))]
        found: dict[str, list[Any]] = {name: [None] * len(images) for name in PIXELS}
        data = BatchFeature()
        for budget, indices in by_budget.items():
            some = others if budget is None else {}
            made = self._processed([images[index] for index in indices], some, hf_kwargs, budget)
            for name in PIXELS:
                for index, row in zip(indices, made.pop(name, ()), strict=True):
                    found[name][index] = row
            data.update(made)
        data.update(found)
        return data

    def _budgets(self, images: Any, items: CropItems) -> Sequence[int | None]:
        """None for those that have the server's."""
        geometry = self.geometry
        assert isinstance(geometry, Gemma4Geometry)
        budgets: list[int | None] = []
        for index, decision in enumerate(items.decisions):
            bound = decision.request.max_tokens if decision.pieces else None
            size = images.get_image_size(index)
            budgets.append(bound and geometry.budget_within(size.width, size.height, bound))
        return budgets

    def _processed(
        self,
        images: Sequence[Any],
        others: Mapping[str, Any],
        hf_kwargs: Mapping[str, object],
        budget: int | None,
    ) -> Any:
        items = dict(others)
        if images:
            items.update(self.info.parse_mm_data({"image": list(images)}, validate=False))
        if not items:
            return BatchFeature()
        own = {} if budget is None else {"max_soft_tokens": budget}
        return self.stock_processed(MultiModalDataItems(items), {**hf_kwargs, **own})


@MULTIMODAL_REGISTRY.register_processor(
    Gemma4MultiModalProcessor,
    info=stock.Gemma4ProcessingInfo,
    dummy_inputs=stock.Gemma4DummyInputsBuilder,
)
class Gemma4ForConditionalGeneration(stock.Gemma4ForConditionalGeneration):
    """The stock model, under the name that its processor is registered for."""
