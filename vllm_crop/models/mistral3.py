# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 with pruning, over vllm/model_executor/models/mistral3.py.

Upstream's prompt has breaks between the rows of an image as tokens of text. Of an image with a plan they come
from the encoder, with the embeddings they have as text: so they are planned like newlines elsewhere, and go
with their rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.model_executor.models import mistral3 as stock
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_crop.models.base import PlainRopeMixin
from vllm_crop.models.encoder import Assemble, Encode, Part, SeenImage
from vllm_crop.models.plan_fields import ASSIGNMENT
from vllm_crop.models.processor import CropProcessorMixin
from vllm_crop.planner import ImageDecision
from vllm_crop.planning.foveation import whole_piece
from vllm_crop.planning.geometry import ImageTokens, TokenGrid
from vllm_crop.planning.plan import TokenPlan

_BREAK = "[IMG_BREAK]"


class Mistral3MultiModalProcessor(CropProcessorMixin, stock.Mistral3MultiModalProcessor):
    """The stock processor, with planned placeholder counts."""

    beside_image = 1  # what ends it

    def plan_for_encoder(self, decision: ImageDecision) -> TokenPlan | None:
        """Any plan: where tokens are evicted, breaks are too, which no text can be."""
        return decision.plan

    def unpruned_assignment(self, grid: ImageTokens) -> NDArray[np.int32]:
        """Breaks are text there."""
        shows = grid.places().part % 2 == 0
        return np.where(shows, shows.cumsum() - 1, -1).astype(np.int32)

    def planned_prompt(self, full: PromptUpdateDetails, planned: int, num_tokens: int) -> PromptUpdateDetails:
        """Breaks are among the embeddings."""
        image, *_, end = full.full
        assert num_tokens == len(full.full) - 1, (
            f"planned for {num_tokens}, the image has {len(full.full) - 1}"
        )
        return PromptUpdateDetails.select_token_id([image] * planned + [end], image)


@MULTIMODAL_REGISTRY.register_processor(
    Mistral3MultiModalProcessor,
    info=stock.Mistral3ProcessingInfo,
    dummy_inputs=stock.Mistral3DummyInputsBuilder,
)
class Mistral3ForConditionalGeneration(PlainRopeMixin, stock.Mistral3ForConditionalGeneration, SupportsMRoPE):
    """The stock model, fed compressed embeddings. Named like it, as speculative decoding compares names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.token_side = config.vision_config.patch_size * config.spatial_merge_size
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self.break_id: int = tokenizer.get_vocab()[_BREAK]

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """Pixels `[3, height, width]` of whole tokens per image."""
        pixels = kwargs["pixel_values"]
        grids = [TokenGrid(*(side // self.token_side for side in one.shape[-2:])) for one in pixels]
        images = [
            self._with_breaks(grid) if len(assignment) else SeenImage.whole(grid.num_tokens)
            for grid, assignment in zip(grids, kwargs[ASSIGNMENT], strict=True)
        ]

        def encode(picked: Sequence[int]) -> Any:
            return self.embed_stock(pixel_values=[pixels[index] for index in picked])

        return images, encode

    def _with_breaks(self, grid: TokenGrid) -> SeenImage:
        part = Part(grid.num_tokens, whole_piece(grid))
        return SeenImage(grid.num_tokens + grid.rows - 1, (part,), self._inserting(grid))

    def _inserting(self, grid: TokenGrid) -> Assemble:
        """What puts a break after each row but the last."""

        def assemble(seen: Sequence[tuple[Any, torch.Tensor]]) -> tuple[torch.Tensor, None]:
            ((_, features),) = seen
            language_model: Any = self.language_model
            break_id = torch.tensor([self.break_id], device=features.device)
            line_break = language_model.model.embed_tokens(break_id).to(features.dtype)
            rows = features.view(grid.rows, grid.cols, -1)
            ended = torch.cat([rows, line_break.expand(grid.rows, 1, -1)], dim=1)
            return ended.flatten(0, 1)[:-1], None

        return assemble
