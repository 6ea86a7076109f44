# SPDX-License-Identifier: Apache-2.0
"""Models that see the whole image in one tile and again in several, their rows ended by newlines."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import VllmConfig

from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.encoder import Encode, Part, SeenImage


class TiledImagesMixin(PlainRopeMixin):
    """PlainRopeMixin for a stock model with `pixel_values` and `image_sizes`, as in vLLM's llava_next.py."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.geometry = geometry_from_configs(vllm_config.model_config.hf_config.to_dict(), {})

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """Per image `[its tiles, 3, side, side]`, the whole image first, and `[height, width]` in pixels."""
        tiles, sizes = kwargs["pixel_values"], kwargs["image_sizes"]

        def encode(picked: Sequence[int]) -> Any:
            if len(picked) == len(sizes):
                return self.embed_stock(pixel_values=tiles, image_sizes=sizes)
            return self.embed_stock(
                pixel_values=[tiles[index] for index in picked], image_sizes=sizes[picked]
            )

        counts = [self.geometry.grid(width, height).num_tokens for height, width in sizes.tolist()]
        return [SeenImage((Part(count),)) for count in counts], encode
