# SPDX-License-Identifier: Apache-2.0
"""Models that see an image in tiles of one size, one after another in the prompt, framed by text.

`image_num_patches` says how many tiles an image has; those of all images lie one after another in one tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.encoder import Encode, SeenImage

COUNTS, IMAGE_TOKEN = "image_num_patches", "image_token_id"


class InternVLImagesMixin(PlainRopeMixin):
    """PlainRopeMixin for a stock model as in vLLM's internvl.py and interns1.py.

    Attributes:
        tile_tokens: features of a tile.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        geometry: Any = geometry_from_configs(vllm_config.model_config.hf_config.to_dict(), {})
        self.tile_tokens = geometry.tile_tokens**2

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """Tiles `[tiles of all images, 3, side, side]`, and how many each image has."""
        tiles, counts = kwargs[self.pixels], kwargs[COUNTS]
        images = [SeenImage.whole(count * self.tile_tokens) for count in counts.tolist()]

        def encode(picked: Sequence[int]) -> Any:
            of_images = tiles.split(counts.tolist())
            some = torch.cat([of_images[index] for index in picked])
            numbers = {COUNTS: counts[list(picked)], IMAGE_TOKEN: kwargs[IMAGE_TOKEN]}
            return self.embed_stock(**{self.pixels: some}, **numbers)

        return images, encode
