# SPDX-License-Identifier: Apache-2.0
"""Models that see the whole image in one tile and again in several, their rows ended by newlines."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.processor import CROP_FIELDS


class TiledImagesMixin(PlainRopeMixin):
    """PlainRopeMixin for a stock model with `pixel_values` and `image_sizes`, as in vLLM's llava_next.py."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.geometry = geometry_from_configs(vllm_config.model_config.hf_config.to_dict(), {})

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of a batch of images or videos, one `[num_embeddings, hidden]` tensor each."""
        stock: Any = super()
        if kwargs.get("pixel_values") is None:  # videos, and image embeddings from the client
            return stock.embed_multimodal(**kwargs)
        tiles, sizes = kwargs["pixel_values"], kwargs["image_sizes"]

        def encode(picked: Sequence[int]) -> Any:
            if len(picked) == len(sizes):
                return self.encode_images(tiles, sizes)
            return self.encode_images([tiles[index] for index in picked], sizes[picked])

        num_tokens = [self.geometry.grid(width, height).num_tokens for height, width in sizes.tolist()]
        return self.crop_encoder(num_tokens, encode, **{name: kwargs[name] for name in CROP_FIELDS})

    def encode_images(self, tiles: torch.Tensor | Sequence[torch.Tensor], image_sizes: torch.Tensor) -> Any:
        """Vision tower, projector and newlines.

        Args:
            tiles: per image `[its tiles, 3, side, side]`, the whole image first, maybe filled up with zeros.
            image_sizes: `[images, 2]`, height and width in pixels.

        Returns:
            Per image `[num_tokens, hidden]`.
        """
        stock: Any = super()
        return stock.embed_multimodal(pixel_values=tiles, image_sizes=image_sizes)
