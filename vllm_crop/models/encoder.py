# SPDX-License-Identifier: Apache-2.0
"""From pixels and plans to compressed embeddings: the vision tower's batches and its feature cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from vllm_crop.compression.pooling import compress
from vllm_crop.compression.served import ServedResampler
from vllm_crop.config import CropConfig
from vllm_crop.models.features import FeatureCache, ImageKey
from vllm_crop.models.plan_fields import NO_PLACES
from vllm_crop.planning.foveation import Piece

Encode = Callable[[Sequence[int]], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Part:
    """What the vision tower encodes by itself: an image, or one of the pieces it is seen in.

    Attributes:
        num_tokens: visual tokens it makes of it.
        piece: None for an image as stock vLLM encodes it.
    """

    num_tokens: int
    piece: Piece | None = None


# Pieces and their features -> rows `[any, hidden]`, and which of them are those of each of the image's
# tokens, `[num_tokens]`; None if they are in order.
Assemble = Callable[[Sequence[tuple[Piece, torch.Tensor]]], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class SeenImage:
    """An image of a batch.

    Attributes:
        num_tokens: its visual tokens, unpruned.
        parts: a single one without a piece, or all pieces, coarse ones first.
        assemble: how its features are made of those of its pieces.
    """

    num_tokens: int
    parts: tuple[Part, ...]
    assemble: Assemble | None = None

    @classmethod
    def whole(cls, num_tokens: int) -> "SeenImage":
        """One that is encoded as stock vLLM does it."""
        return cls(num_tokens, (Part(num_tokens),))


class CompressingEncoder:
    """Runs the vision tower on images not seen lately and compresses the features by each image's plan.

    The scheduler charges an image by its compressed tokens, so a step may bring many more images than
    memory was profiled for. They are encoded in batches of the profiled number of tokens
    (vllm/multimodal/encoder_budget.py), not one by one.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = CropConfig.from_mapping(vllm_config.model_config.hf_config.crop)
        # A model is made with its device as torch's default one, and the budget asks the image processor what
        # the largest image has: some make tensors on the way and read them as numpy arrays.
        with torch.device("cpu"):
            budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
        self.max_tokens = budget.get_encoder_budget()
        self.largest_image = budget.mm_max_toks_per_item.get("image", 0)
        self.peak_tokens = 0
        self.num_encoded = 0
        self.tokens_encoded = 0
        self.cache = FeatureCache(config.vit_cache_mib << 20, vllm_config.device_config.device)
        self.reuses_larger = config.foveation.reuse == "larger"
        self.resampler = None
        if config.compression == "resampler":
            self.resampler = ServedResampler(
                config.resampler, vllm_config.model_config.dtype, vllm_config.device_config.device
            )

    def start_anew(self) -> None:
        """Forget what other weights have made, when the model's are loaded."""
        self.cache.clear()
        if self.resampler is not None:
            self.resampler.restore()

    def rehearse(self) -> None:
        """Take the compressor's memory while vLLM measures what its largest items take, images or videos."""
        if self.resampler is not None:
            self.resampler.rehearse(self.largest_image)

    def __call__(
        self,
        images: Sequence[SeenImage],
        encode: Encode,
        crop_assignment: Sequence[torch.Tensor],
        crop_image_key: Sequence[torch.Tensor],
        crop_positions: Sequence[torch.Tensor],
        crop_places: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Embed a batch of images.

        Args:
            encode: the indices of some of the parts, counted through all images -> their features,
                `[num_tokens, hidden]` each.
            crop_assignment: per image `[num_tokens]`, or empty for an image served whole.
            crop_image_key: per image `[parts, 2]`, two 64-bit words made of what a part shows, or empty.
            crop_positions: per image `[num_embeddings]`, or empty; checked against the result.
            crop_places: per image `[num_tokens, 4]`, or empty for one that is not resampled; None where the
                server has no resampler.
        """
        parts = [part for image in images for part in image.parts]
        keys = [
            _cache_key(words, part, is_first=part is image.parts[0])
            for key, image in zip(crop_image_key, images, strict=True)
            for words, part in zip(key.tolist() or [()] * len(image.parts), image.parts, strict=True)
        ]
        seen = iter(self._features(parts, encode, keys))
        self.rehearse()
        places = [NO_PLACES] * len(images) if crop_places is None else crop_places
        plans = zip(images, crop_assignment, crop_positions, places, strict=True)
        embeddings = []
        for image, assignment, positions, placed in plans:
            whole, order = _assembled(image, [next(seen) for _ in image.parts])
            if self.resampler is not None and len(placed):
                whole = whole if order is None else whole[order.to(whole.device)]
                rows = self.resampler(whole, assignment, placed)
            else:
                rows = compress(whole, assignment, order) if len(assignment) else whole
            expected = len(positions) or image.num_tokens
            # vLLM slices what it needs and drops surplus rows silently.
            assert len(rows) == expected, f"{len(rows)} embeddings for {expected} placeholders"
            embeddings.append(rows)
        return embeddings

    def _features(
        self, parts: Sequence[Part], encode: Encode, keys: Sequence[ImageKey]
    ) -> list[torch.Tensor]:
        found = [self._cached(key) for key in keys]
        # Keyed parts that occur twice in the batch (two regions of one image) are encoded once.
        missing: dict[object, list[int]] = {}
        for index, known in enumerate(found):
            if known is None:
                missing.setdefault(keys[index] or index, []).append(index)
        for batch in self._batches([group[0] for group in missing.values()], parts):
            num_tokens = sum(parts[index].num_tokens for index in batch)
            self.peak_tokens = max(self.peak_tokens, num_tokens)
            self.num_encoded += len(batch)
            self.tokens_encoded += num_tokens
            for first, features in zip(batch, encode(batch), strict=True):
                self.cache.store(keys[first], features)
                for index in missing[keys[first] or first]:
                    found[index] = features
        return [features for features in found if features is not None]

    def _cached(self, key: ImageKey) -> torch.Tensor | None:
        if not key:
            return None
        features = self.cache.find(key)
        return self.cache.find_larger(key) if features is None and self.reuses_larger else features

    def _batches(self, indices: Sequence[int], parts: Sequence[Part]) -> Iterator[list[int]]:
        """`indices` in order, cut into batches of at most `max_tokens`, or of a single part."""
        batch: list[int] = []
        for index in indices:
            if batch and sum(parts[other].num_tokens for other in [*batch, index]) > self.max_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def _cache_key(words: Sequence[int], part: Part, is_first: bool) -> ImageKey:
    """With the size of what is stored: nothing that names an image may bring features of another size.

    All of a picture, the first of its parts, has the key of an image that is sent by itself.
    """
    if not words:
        return ()
    return (*words, part.num_tokens) if part.piece is None or is_first else (*words, *part.piece.window)


def _assembled(image: SeenImage, seen: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The features of what an image was seen in, and which are those of each token, if not in order."""
    if image.assemble is None:
        (whole,) = seen
        return whole, None
    parts = zip(image.parts, seen, strict=True)
    return image.assemble([(part.piece, rows) for part, rows in parts if part.piece is not None])
