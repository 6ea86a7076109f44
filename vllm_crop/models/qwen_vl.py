# SPDX-License-Identifier: Apache-2.0
"""What the models of the Qwen-VL line share: images as patches with their grids beside, and M-RoPE.

Videos pass through untouched.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_crop.families.view_size import size_for_tokens
from vllm_crop.localizers.thumbnails import Picture, as_picture
from vllm_crop.models.base import CropModelMixin, original_mrope_positions
from vllm_crop.models.encoder import Encode, Part, SeenImage
from vllm_crop.models.image_keys import image_key, piece_keys
from vllm_crop.models.piece_pixels import pixels_of
from vllm_crop.models.placed_pieces import metadata_of_pieces
from vllm_crop.models.plan_fields import IMAGE_KEY, PIECES, piece_numbers, pieces_of
from vllm_crop.models.processor import CropItems, CropProcessorMixin
from vllm_crop.planner import ImageDecision
from vllm_crop.planning.foveation import Piece, sources, whole_piece
from vllm_crop.planning.geometry import TokenGrid


class CropQwenVLProcessorMixin(CropProcessorMixin):
    """CropProcessorMixin for image processors that turn a picture into patches of `pixel_values`.

    Of a foveated image its pieces are resized and normalised, coarse ones first, and nothing else. Its grid
    stays that of the whole image, which position ids are made of.
    """

    def can_be_foveated(self, is_picture: bool) -> bool:
        """Pictures can: their pixels are cut here."""
        return is_picture

    @cached_property
    def _resample(self) -> Image.Resampling:
        """The image processor's, with the server's settings over it."""
        return Image.Resampling(int(self.image_processor_settings()["resample"]))

    def images_processed(self, mm_items: Any, hf_kwargs: Mapping[str, object], items: CropItems) -> Any:
        """As the stock processor, which is given the pieces of images that are seen in pieces."""
        decisions = items.decisions
        if not any(one.pieces for one in decisions):
            return super().images_processed(mm_items, hf_kwargs, items)
        images = [mm_items["image"].get(index) for index in range(len(decisions))]
        whole = [image for image, one in zip(images, decisions, strict=True) if not one.pieces]
        others = {name: data for name, data in mm_items.items() if name != "image"}
        data = self._processed(whole, hf_kwargs, others)
        of_whole, patches = iter(_split(data)), []
        opened: dict[int, Picture | None] = {}  # one image may come several times
        keys = [image_key(image_hash) for image_hash in items.image_hashes]
        for index, decision in enumerate(decisions):
            if not decision.pieces:
                patches.append(next(of_whole))
                continue
            if id(images[index]) not in opened:
                opened[id(images[index])] = as_picture(images[index])
            picture = items.pictures[index] or opened[id(images[index])]
            assert picture is not None  # can_be_foveated
            view = self._view_of(picture, decision)
            patches += self._patches_of(picture.open(), view, decision.pieces, hf_kwargs)
            if items.image_hashes[index]:
                keys[index] = self._keys_of(view, decision.pieces, items.image_hashes[index])
        merge = self.info.get_image_processor().merge_size
        grids = iter(data.get("image_grid_thw", ()))
        data["image_grid_thw"] = torch.stack(
            [_grid_thw(one, merge) if one.pieces else next(grids) for one in decisions]
        )
        data["pixel_values"] = torch.cat(patches)
        data[IMAGE_KEY], data[PIECES] = keys, [piece_numbers(one.pieces) for one in decisions]
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if PIECES not in hf_inputs:
            return fields
        per_token = self.info.get_image_processor().merge_size ** 2
        sizes = [
            sum(Piece.from_numbers(one).num_tokens for one in pieces.tolist()) * per_token or int(grid.prod())
            for pieces, grid in zip(hf_inputs[PIECES], hf_inputs["image_grid_thw"], strict=True)
        ]
        patches = MultiModalFieldConfig.flat_from_sizes("image", torch.tensor(sizes))
        return {**fields, "pixel_values": patches}

    def _patches_of(
        self,
        image: Image.Image,
        view: Image.Image,
        pieces: Sequence[Piece],
        hf_kwargs: Mapping[str, object],
    ) -> list[torch.Tensor]:
        processor = self.info.get_image_processor()
        side = processor.patch_size * processor.merge_size
        cut = [pixels_of(image, piece, side, self._resample) for piece in pieces[1:]]
        made = [self._processed([view], hf_kwargs)]
        if cut:
            made.append(self._processed(cut, {**hf_kwargs, "do_resize": False}))
        grids = torch.cat([one["image_grid_thw"] for one in made]) // processor.merge_size
        assert grids[:, 1:].tolist() == [[piece.rows, piece.cols] for piece in pieces], grids
        return [one["pixel_values"] for one in made]

    def _view_of(self, picture: Picture, decision: ImageDecision) -> Image.Image:
        """The small image; beside larger pieces the one that the localizer is shown, of the same pixels."""
        width, height = picture.open().size
        if len(decision.pieces) == 1:
            processor, (view,) = self.info.get_image_processor(), decision.pieces
            side = processor.patch_size * processor.merge_size
            return picture.shrunk((view.cols * side, view.rows * side))
        most = self.planner.view_tokens(self.geometry.grid(width, height).num_tokens)
        size = size_for_tokens(self.geometry, width, height, most)
        assert size is not None  # else there were no pieces
        return picture.shrunk(size)

    def _keys_of(self, view: Image.Image, pieces: Sequence[Piece], image_hash: str) -> torch.Tensor:
        """Names of what each piece shows; the view's is that of the same small image sent by itself."""
        names = [image_key(self._hash_of(view))]
        if pieces[1:]:
            names.append(piece_keys(image_hash, pieces[1:]))
        return torch.cat(names)

    def _processed(
        self, images: Sequence[Any], hf_kwargs: Mapping[str, object], others: Mapping[str, Any] | None = None
    ) -> Any:
        items = dict(others or {})
        if images:
            items.update(self.info.parse_mm_data({"image": list(images)}, validate=False))
        if not items:
            return BatchFeature()
        return self.stock_processed(MultiModalDataItems(items), hf_kwargs)

    def _hash_of(self, image: Image.Image) -> str:
        items = self.info.parse_mm_data({"image": [image]}, validate=False)
        (found,) = self.stock_hashes(ProcessorInputs([], items))["image"]
        return found


def _split(data: Any) -> list[torch.Tensor]:
    if "pixel_values" not in data:
        return []
    return list(data["pixel_values"].split(data["image_grid_thw"].prod(-1).tolist()))


def _grid_thw(decision: ImageDecision, merge: int) -> torch.Tensor:
    assert decision.plan is not None
    (part,) = decision.plan.grid.parts
    return torch.tensor([1, part.grid.rows * merge, part.grid.cols * merge])


def _seen(grid: TokenGrid, pieces: tuple[Piece, ...]) -> SeenImage:
    if not pieces:
        return SeenImage.whole(grid.num_tokens)

    def assemble(seen: Sequence[tuple[Piece, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sources(grid, [piece for piece, _ in seen])
        return torch.cat([features for _, features in seen]), torch.from_numpy(rows)

    return SeenImage(grid.num_tokens, tuple(Part(piece.num_tokens, piece) for piece in pieces), assemble)


class CropQwenVLMixin(CropModelMixin):
    """Mixed in front of a model like vllm/model_executor/models/qwen2_5_vl.py."""

    visual: Any

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """The patches of all images `[patches, ...]`, and per image its grid `[1, rows, columns]` of them."""
        patches, grids = kwargs["pixel_values"], kwargs["image_grid_thw"]
        merge = self.visual.spatial_merge_size
        full = [TokenGrid(rows // merge, cols // merge) for _, rows, cols in grids.tolist()]
        in_pieces = pieces_of(kwargs, len(grids))
        if not any(in_pieces):
            images = [SeenImage.whole(grid.num_tokens) for grid in full]
            return images, self._encode_whole(patches, grids)
        images = [_seen(grid, pieces) for grid, pieces in zip(full, in_pieces, strict=True)]
        encoded = [
            piece
            for grid, pieces in zip(full, in_pieces, strict=True)
            for piece in pieces or (whole_piece(grid),)
        ]

        def encode(picked: Sequence[int]) -> Any:
            split = patches.split([piece.num_tokens * merge**2 for piece in encoded])
            pieces = [encoded[index] for index in picked]
            features = self.visual(
                torch.cat([split[index] for index in picked]),
                [[1, piece.rows * merge, piece.cols * merge] for piece in pieces],
                encoder_metadata=metadata_of_pieces(self.visual, pieces),
            )
            return features.split([piece.num_tokens for piece in pieces])

        return images, encode

    def _encode_whole(self, patches: torch.Tensor, grids: torch.Tensor) -> Encode:
        def encode(picked: Sequence[int]) -> Any:
            if len(picked) == len(grids):
                return self.embed_stock(pixel_values=patches, image_grid_thw=grids)
            images = patches.split(grids.prod(-1).tolist())
            some = torch.cat([images[index] for index in picked])
            return self.embed_stock(pixel_values=some, image_grid_thw=grids[picked])

        return encode

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> Any:
        """The ids that tokens have in the unpruned prompt, `[3, num_tokens]`, and their excess."""
        stock: Any = super()
        return original_mrope_positions(input_tokens, mm_features, stock.get_mrope_input_positions)
