# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: the whole image, resized to what one of five budgets of tokens has room for.

Follows `_compute_num_soft_tokens` of vllm/model_executor/models/gemma4_mm.py step by step: where a side comes
out whole, another order of the same operations rounds it to one token less. transformers'
get_aspect_ratio_preserving_size counts alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.plain import PlainText, SeenWhole
from vllm_crop.families.text_layers import decoder_layers
from vllm_crop.planning.foveation import Piece, whole_piece
from vllm_crop.planning.geometry import Box, ImageView, TokenGrid

BUDGETS = (70, 140, 280, 560, 1120)


@dataclass(frozen=True)
class Gemma4Geometry(PlainText, SeenWhole):
    """The geometry of a Gemma4ImageProcessor.

    Attributes:
        patch: pixels of a patch's side.
        pool: patches along a visual token's side.
        budget: tokens of an image at most, unless less is asked for.
    """

    why_no_regions: ClassVar[str] = (
        "the tokens of an image attend to each other in both directions, which needs all of them in every "
        "layer"
    )
    why_no_foveation: ClassVar[str] = why_no_regions
    fewest_tokens: ClassVar[int] = BUDGETS[0]

    patch: int
    pool: int
    budget: int
    num_layers: int

    @classmethod
    def from_configs(cls, model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Self:
        """Read `config.json` and the image processor's settings.

        Raises:
            UnsupportedModelError: a budget that the image processor does not have.
        """
        vision = model.get("vision_config") or {}
        budget = preprocessor.get("max_soft_tokens") or vision.get("default_output_length") or 280
        if budget not in BUDGETS:
            raise UnsupportedModelError(f"max_soft_tokens {budget!r} is none of {list(BUDGETS)}")
        layers = decoder_layers({"model_type": "gemma4_text", **(model.get("text_config") or {})})
        return cls(vision.get("patch_size", 16), vision.get("pooling_kernel_size", 3), budget, layers)

    @property
    def token_side(self) -> int:
        """Pixels of a visual token's side after the resize."""
        return self.patch * self.pool

    @property
    def max_tokens(self) -> int:
        """The budget: some image fills it."""
        return self.budget

    def grid(self, width: int, height: int) -> TokenGrid:
        """As many rows and columns as the budget has room for."""
        return self._grid(width, height, self.budget)

    def _grid(self, width: int, height: int, budget: int) -> TokenGrid:
        patches = (height / self.patch) * (width / self.patch)
        scale = math.sqrt(budget * self.pool**2 / patches)
        rows, cols = (max(1, math.floor(side * scale / self.token_side)) for side in (height, width))
        # A side of less than a token is a token's; the other one ends with the budget.
        return TokenGrid(min(rows, budget), min(cols, budget))

    def budget_within(self, width: int, height: int, max_tokens: int) -> int | None:
        """The largest budget at which an image costs no more; None if the smallest one costs more."""
        fitting = (
            budget
            for budget in reversed(BUDGETS)
            if budget <= self.budget and self._grid(width, height, budget).num_tokens <= max_tokens
        )
        return next(fitting, None)

    def small(self, width: int, height: int, max_tokens: int) -> tuple[Piece, ...]:
        """The image at that budget."""
        budget = self.budget_within(width, height, max_tokens)
        return () if budget is None else (whole_piece(self._grid(width, height, budget)),)

    def view(self, width: int, height: int) -> ImageView:
        """All of the image."""
        return ImageView(Box(0.0, 0.0, 1.0, 1.0))

    def pixels(self, width: int, height: int) -> tuple[int, int]:
        """Those of whole tokens."""
        grid = self.grid(width, height)
        return grid.cols * self.token_side, grid.rows * self.token_side
