# SPDX-License-Identifier: Apache-2.0
"""The exact reference: plain transformers in float32, fed the embeddings a plan asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vllm_crop.geometry import Region
from vllm_crop.plan import Compression, TokenPlan, make_plan
from vllm_crop.vision_geometry import LlavaGeometry


@dataclass(frozen=True)
class Reference:
    """Greedy tokens and full-vocabulary logprobs `[steps, vocab]` of one prompt."""

    token_ids: list[int]
    logprobs: torch.Tensor
    num_prompt_tokens: int


def naive_compress(features: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    """One mean per planned embedding, written out: `[num_tokens, hidden]` -> `[num_embeddings, hidden]`."""
    return torch.stack([features[list(e.tokens)].mean(dim=0) for e in plan.embeddings])


class HfLlava:
    """transformers' LLaVA, attention written out (eager), one prompt at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.image_token_id = self.model.config.image_token_index
        self.geometry = LlavaGeometry.from_configs(
            self.model.config.to_dict(), self.processor.image_processor.to_dict()
        )

    def plan(
        self, image: Image.Image, region: Region | None, pruning_rate: float, compression: Compression
    ) -> TokenPlan | None:
        """What is to become of an image; None if the model sees nothing of the region."""
        seen = region and self.geometry.view(*image.size).project(region)
        return seen and make_plan(self.geometry.grid(*image.size), seen, pruning_rate, compression)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        images: Sequence[Image.Image],
        plans: Sequence[TokenPlan | None],
        steps: int,
        original_positions: bool = False,
    ) -> Reference:
        """Answer greedily.

        Args:
            prompt_ids: with one image token per image.
            plans: per image, None for all its tokens.
            original_positions: number tokens as in the unpruned prompt.
        """
        embed = self.model.get_input_embeddings()
        rows: list[torch.Tensor] = []
        positions: list[int] = []
        next_position = 0
        image_index = 0
        for token in prompt_ids:
            if token != self.image_token_id:
                rows.append(embed(torch.tensor([token])))
                positions.append(next_position)
                next_position += 1
                continue
            features, plan = self._features(images[image_index]), plans[image_index]
            image_index += 1
            within = list(range(len(features))) if plan is None else [e.position for e in plan.embeddings]
            num_full = len(features)
            if plan is not None:
                features = naive_compress(features, plan)
            if not original_positions:
                within, num_full = list(range(len(features))), len(features)
            rows.append(features)
            positions.extend(next_position + position for position in within)
            next_position += num_full
        return self._decode(torch.cat(rows), positions, next_position, steps)

    def _features(self, image: Image.Image) -> torch.Tensor:
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        return features[0] if not isinstance(features, torch.Tensor) or features.ndim == 3 else features

    def _decode(self, rows: torch.Tensor, positions: list[int], next_position: int, steps: int) -> Reference:
        embeds, token_ids, logprobs = rows, [], []
        for _ in range(steps):
            output = self.model.model.language_model(
                inputs_embeds=embeds[None],
                position_ids=torch.tensor([positions]),
                # Without a mask, transformers takes gaps in the positions for borders of packed sequences.
                attention_mask=torch.ones(1, len(positions), dtype=torch.long),
                use_cache=False,
            )
            logits = self.model.lm_head(output.last_hidden_state[0, -1])
            logprobs.append(torch.log_softmax(logits.double(), dim=-1))
            token_ids.append(int(logits.argmax()))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([token_ids[-1]]))])
            positions = [*positions, next_position]
            next_position += 1
        return Reference(token_ids, torch.stack(logprobs), len(rows))
