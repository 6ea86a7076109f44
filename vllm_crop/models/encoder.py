# SPDX-License-Identifier: Apache-2.0
"""From pixels and plans to compressed embeddings: the vision tower's batches and its feature cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from vllm_crop.config import CropConfig
from vllm_crop.models.features import FeatureCache, ImageKey, compress

Encode = Callable[[Sequence[int]], Iterable[torch.Tensor]]


class CompressingEncoder:
    """Runs the vision tower on images not seen lately and compresses the features by each image's plan.

    The scheduler charges an image by its compressed tokens, so a step may bring many more images than
    memory was profiled for. They are encoded in batches of the profiled number of tokens
    (vllm/multimodal/encoder_budget.py), not one by one.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = CropConfig.from_mapping(vllm_config.model_config.hf_config.crop)
        budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
        self.max_tokens = budget.get_encoder_budget()
        self.peak_tokens = 0
        self.num_encoded = 0
        self.cache = FeatureCache(config.vit_cache_mib << 20, vllm_config.device_config.device)

    def __call__(
        self,
        num_tokens: Sequence[int],
        encode: Encode,
        crop_assignment: Sequence[torch.Tensor],
        crop_image_key: Sequence[torch.Tensor],
        crop_positions: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Embed a batch of images.

        Args:
            num_tokens: per image, unpruned.
            encode: the indices of some of the images -> their features, `[num_tokens, hidden]` each.
            crop_assignment: per image `[num_tokens]`, or empty for an image served whole.
            crop_image_key: per image two 64-bit words made of its pixels, or empty.
            crop_positions: per image `[num_embeddings]`, or empty; checked against the result.
        """
        # With the size of what is stored: nothing that names an image may bring features of another size.
        keys: list[ImageKey] = [
            (*key.tolist(), count) if len(key) else ()
            for key, count in zip(crop_image_key, num_tokens, strict=True)
        ]
        features = self._features(num_tokens, encode, keys)
        plans = zip(num_tokens, crop_assignment, crop_positions, strict=True)
        embeddings = []
        for full, (count, assignment, positions) in zip(features, plans, strict=True):
            rows = compress(full, assignment) if len(assignment) else full
            expected = len(positions) or count
            # vLLM slices what it needs and drops surplus rows silently.
            assert len(rows) == expected, f"{len(rows)} embeddings for {expected} placeholders"
            embeddings.append(rows)
        return embeddings

    def _features(
        self, num_tokens: Sequence[int], encode: Encode, keys: Sequence[ImageKey]
    ) -> list[torch.Tensor]:
        features = [self.cache.find(key) if key else None for key in keys]
        # Keyed images that occur twice in the batch (two regions of one image) are encoded once.
        missing: dict[object, list[int]] = {}
        for index, known in enumerate(features):
            if known is None:
                missing.setdefault(keys[index] or index, []).append(index)
        for batch in self._batches([group[0] for group in missing.values()], num_tokens):
            self.peak_tokens = max(self.peak_tokens, sum(num_tokens[image] for image in batch))
            self.num_encoded += len(batch)
            for image, image_features in zip(batch, encode(batch), strict=True):
                self.cache.store(keys[image], image_features)
                for index in missing[keys[image] or image]:
                    features[index] = image_features
        return [image_features for image_features in features if image_features is not None]

    def _batches(self, images: Sequence[int], num_tokens: Sequence[int]) -> Iterator[list[int]]:
        """`images` in order, cut into batches of at most `max_tokens`, or of a single image."""
        batch: list[int] = []
        for image in images:
            if batch and sum(num_tokens[index] for index in [*batch, image]) > self.max_tokens:
                yield batch
                batch = []
            batch.append(image)
        if batch:
            yield batch
