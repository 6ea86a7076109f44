# SPDX-License-Identifier: Apache-2.0
"""What the models of the Qwen-VL line share: images as patches with their grids beside, and M-RoPE.

Videos pass through untouched.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_crop.models.base import CropModelMixin, original_mrope_positions
from vllm_crop.models.processor import CROP_FIELDS


class CropQwenVLMixin(CropModelMixin):
    """Mixed in front of a model like vllm/model_executor/models/qwen2_5_vl.py."""

    visual: Any

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of a batch of images or videos, one `[num_embeddings, hidden]` tensor each."""
        if kwargs.get("pixel_values") is None:  # videos, and image embeddings from the client
            stock: Any = super()
            return stock.embed_multimodal(**kwargs)
        pixel_values, grids = kwargs["pixel_values"], kwargs["image_grid_thw"]
        num_patches = grids.prod(-1)

        def encode(picked: Sequence[int]) -> Any:
            if len(picked) == len(grids):
                return self.encode_images(pixel_values, grids)
            images = pixel_values.split(num_patches.tolist())
            return self.encode_images(torch.cat([images[index] for index in picked]), grids[picked])

        num_tokens = (num_patches // self.visual.spatial_merge_size**2).tolist()
        return self.crop_encoder(num_tokens, encode, **{name: kwargs[name] for name in CROP_FIELDS})

    def encode_images(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        """Vision tower: `[patches of all images, ...]` -> per image `[num_tokens, hidden]`."""
        stock: Any = super()
        return stock.embed_multimodal(pixel_values=pixel_values, image_grid_thw=image_grid_thw)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> Any:
        """The ids that tokens have in the unpruned prompt, `[3, num_tokens]`, and their excess."""
        stock: Any = super()
        return original_mrope_positions(input_tokens, mm_features, stock.get_mrope_input_positions)
