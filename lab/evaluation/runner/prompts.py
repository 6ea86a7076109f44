# SPDX-License-Identifier: Apache-2.0
"""Prompts in two parts: what stands before the questions, images included, and the questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.evaluation.runner.decoder import Texts
from vllm_crop.planning.geometry import TokenGrid


@dataclass(frozen=True)
class Prompts:
    """The questions about the same images.

    Attributes:
        prefix: `[before]` token ids, one placeholder per visual token.
        positions: `[3, before]` M-RoPE positions of them.
        next_position: of the first token behind.
        texts: the rest of each prompt.
        lead: tokens before the first visual one.
    """

    prefix: Tensor
    positions: Tensor
    next_position: int
    texts: Texts
    lead: int


class PromptMaker:
    """Builds prompts with the checkpoint's own chat template and position rule."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.template = processor
        self.image = model.config.image_token_id
        self.merge = model.config.vision_config.spatial_merge_size

    def make(self, grids: Sequence[TokenGrid], questions: Sequence[str]) -> Prompts:
        """Prompts that differ in the question only."""
        encoded = [self._encode(len(grids), question) for question in questions]
        split = self._split(encoded[0], len(grids))
        prefix: list[int] = []
        pending = iter(grids)
        for token in encoded[0][:split]:
            prefix += [token] * (next(pending).num_tokens if token == self.image else 1)
        ids = torch.tensor(prefix)
        positions, next_position = self._positions(ids, grids)
        visual = (ids == self.image).nonzero()
        lead = int(visual[0]) if len(visual) else len(ids)
        return Prompts(ids, positions, next_position, self._texts([one[split:] for one in encoded]), lead)

    def _encode(self, images: int, question: str) -> list[int]:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        text = self.template.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _split(self, ids: Sequence[int], images: int) -> int:
        """Behind the last image; without any, behind the first token."""
        return len(ids) - 1 - ids[::-1].index(self.image) + 1 if images else 1

    def _positions(self, ids: Tensor, grids: Sequence[TokenGrid]) -> tuple[Tensor, int]:
        patches = [[1, grid.rows * self.merge, grid.cols * self.merge] for grid in grids]
        kinds = (ids == self.image).int()[None]
        positions, _ = self.model.model.get_rope_index(
            ids[None], kinds, torch.tensor(patches) if patches else None
        )
        return positions[:, 0], int(positions.max()) + 1

    def _texts(self, rows: Sequence[Sequence[int]]) -> Texts:
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        words = torch.zeros(len(rows), longest, dtype=torch.bool)
        special = set(self.tokenizer.all_special_ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            words[index, : len(row)] = torch.tensor([token not in special for token in row])
        return Texts(ids, words, torch.tensor([len(row) for row in rows]))
