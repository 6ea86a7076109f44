# SPDX-License-Identifier: Apache-2.0
"""From pixels and plans to compressed embeddings: the vision tower's batches and its feature cache."""

from collections.abc import Callable, Sequence

import torch
from vllm.config import VllmConfig

from vllm_crop.compression.feature_cache import FeatureCache, ImageKey
from vllm_crop.compression.pool import compress
from vllm_crop.config import CropConfig
from vllm_crop.vision_geometry import geometry_from_configs

Encode = Callable[[torch.Tensor], torch.Tensor]


class CompressingEncoder:
    """Runs the vision tower on images not seen lately and compresses the features by each image's plan.

    The scheduler charges an image by its compressed tokens, so a step may bring many more images than
    memory was profiled for. They are encoded in batches of the profiled size
    (vllm/multimodal/encoder_budget.py), not one by one.
    """

    def __init__(self, vllm_config: VllmConfig, encode: Encode) -> None:
        """`encode`: pixel values `[images, 3, height, width]` -> features `[images, num_tokens, hidden]`."""
        hf_config = vllm_config.model_config.hf_config
        config = CropConfig.from_mapping(hf_config.crop)
        self.num_tokens = geometry_from_configs(hf_config.to_dict(), {}).grid(1, 1).num_tokens
        scheduler = vllm_config.scheduler_config
        budget = min(scheduler.max_num_encoder_input_tokens, scheduler.encoder_cache_size)
        self.max_batch = max(1, budget // self.num_tokens)
        self.peak_batch = 0
        self.num_encoded = 0
        self.cache = FeatureCache(config.vit_cache_mib << 20, vllm_config.device_config.device)
        self._encode = encode

    def __call__(
        self,
        pixel_values: torch.Tensor,
        crop_assignment: Sequence[torch.Tensor],
        crop_image_key: Sequence[torch.Tensor],
        crop_positions: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Embed a batch of images.

        Args:
            pixel_values: `[images, 3, height, width]`.
            crop_assignment: per image `[num_tokens]`, or empty for an image served whole.
            crop_image_key: per image two 64-bit words naming its pixels, or empty.
            crop_positions: per image `[num_embeddings]`, or empty; checked against the result.
        """
        keys: list[ImageKey] = [tuple(key.tolist()) for key in crop_image_key]
        features = self._features(pixel_values, keys)
        embeddings = []
        for full, assignment, positions in zip(features, crop_assignment, crop_positions, strict=True):
            rows = compress(full, assignment) if len(assignment) else full
            expected = len(positions) or self.num_tokens
            # vLLM slices what it needs and drops surplus rows silently.
            assert len(rows) == expected, f"{len(rows)} embeddings for {expected} placeholders"
            embeddings.append(rows)
        return embeddings

    def _features(self, pixel_values: torch.Tensor, keys: Sequence[ImageKey]) -> list[torch.Tensor]:
        features = [self.cache.get(key) if key else None for key in keys]
        # Keyed images that occur twice in the batch (two regions of one image) are encoded once.
        missing: dict[object, list[int]] = {}
        for index, known in enumerate(features):
            if known is None:
                missing.setdefault(keys[index] or index, []).append(index)
        groups = list(missing.values())
        for start in range(0, len(groups), self.max_batch):
            batch = groups[start : start + self.max_batch]
            encoded = self._encode(pixel_values[[group[0] for group in batch]])
            self.peak_batch = max(self.peak_batch, len(batch))
            self.num_encoded += len(batch)
            for group, image_features in zip(batch, encoded, strict=True):
                self.cache.put(keys[group[0]], image_features)
                for index in group:
                    features[index] = image_features
        return [image_features for image_features in features if image_features is not None]
