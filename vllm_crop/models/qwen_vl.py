# SPDX-License-Identifier: Apache-2.0
"""What the models of the Qwen-VL line share: images as patches with their grids beside, and M-RoPE.

Videos pass through untouched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_crop.models.base import CropModelMixin, original_mrope_positions
from vllm_crop.models.encoder import Encode


class CropQwenVLMixin(CropModelMixin):
    """Mixed in front of a model like vllm/model_executor/models/qwen2_5_vl.py."""

    visual: Any

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[int], Encode]:
        """The patches of all images `[patches, ...]`, and per image its grid `[1, rows, columns]` of them."""
        patches, grids = kwargs["pixel_values"], kwargs["image_grid_thw"]
        num_patches = grids.prod(-1)

        def encode(picked: Sequence[int]) -> Any:
            if len(picked) == len(grids):
                return self.embed_stock(pixel_values=patches, image_grid_thw=grids)
            images = patches.split(num_patches.tolist())
            some = torch.cat([images[index] for index in picked])
            return self.embed_stock(pixel_values=some, image_grid_thw=grids[picked])

        return (num_patches // self.visual.spatial_merge_size**2).tolist(), encode

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> Any:
        """The ids that tokens have in the unpruned prompt, `[3, num_tokens]`, and their excess."""
        stock: Any = super()
        return original_mrope_positions(input_tokens, mm_features, stock.get_mrope_input_positions)
