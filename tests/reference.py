# SPDX-License-Identifier: Apache-2.0
"""The exact reference: transformers in float32, fed the embeddings a plan asks for.

Without eviction the stock forward pass answers. With it, transformers' own decoder layers run one by one,
each on the rows present there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

from vllm_crop.budget import Method
from vllm_crop.geometry import Region
from vllm_crop.plan import Compression, TokenPlan, make_plan, whole_image_plan
from vllm_crop.vision_geometry import LlavaGeometry


@dataclass(frozen=True)
class Reference:
    """Greedy tokens and full-vocabulary logprobs `[steps, vocab]` of one prompt.

    Attributes:
        prompt_rows_per_layer: how many of the prompt's tokens each decoder layer runs with.
    """

    token_ids: list[int]
    logprobs: torch.Tensor
    num_prompt_tokens: int
    prompt_rows_per_layer: list[int]


@dataclass(frozen=True)
class Prompt:
    """What the language model is fed, one entry per prompt token.

    Attributes:
        rows: embeddings `[tokens, hidden]`.
        positions: position ids `[tokens]`.
        num_layers: the decoder layers each token takes part in, counted from the first, `[tokens]`.
        next_position: of the first generated token.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    num_layers: torch.Tensor
    next_position: int


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
        self,
        image: Image.Image,
        region: Region | None,
        pruning_rate: float,
        compression: Compression,
        method: Method = "plc",
        eviction_layers: tuple[int, ...] = (),
    ) -> TokenPlan | None:
        """What is to become of an image; None if the model sees nothing of the region."""
        seen = region and self.geometry.view(*image.size).project(region)
        return seen and make_plan(
            self.geometry.grid(*image.size),
            seen,
            pruning_rate,
            compression,
            method=method,
            num_layers=self.geometry.num_layers,
            eviction_layers=eviction_layers,
        )

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
        prompt = self.embed(prompt_ids, images, plans, original_positions)
        nothing_evicted = bool((prompt.num_layers == self.geometry.num_layers).all())
        return self.decode(prompt, steps) if nothing_evicted else self.decode_by_layer(prompt, steps)

    @torch.inference_mode()
    def embed(
        self,
        prompt_ids: Sequence[int],
        images: Sequence[Image.Image],
        plans: Sequence[TokenPlan | None],
        original_positions: bool = False,
    ) -> Prompt:
        """The prompt as the language model is fed it."""
        rows: list[torch.Tensor] = []
        positions: list[int] = []
        evicted_from: list[int | None] = []
        next_position = 0
        pending = iter(zip(images, plans, strict=True))
        for token in prompt_ids:
            if token != self.image_token_id:
                rows.append(self._embed_token(token))
                positions.append(next_position)
                evicted_from.append(None)
                next_position += 1
                continue
            image, plan = next(pending)
            features = self._features(image)
            num_full = len(features)
            plan = plan or whole_image_plan(self.geometry.grid(*image.size))
            features = naive_compress(features, plan)
            within = [e.position for e in plan.embeddings]
            if not original_positions:
                within, num_full = list(range(len(features))), len(features)
            rows.append(features)
            positions.extend(next_position + position for position in within)
            evicted_from.extend(e.evicted_from_layer for e in plan.embeddings)
            next_position += num_full
        evicted_from[-1] = None  # the first answer token comes from the last row, even if it is an image's
        depth = self.geometry.num_layers
        num_layers = [depth if layer is None else min(layer, depth) for layer in evicted_from]
        return Prompt(torch.cat(rows), torch.tensor(positions), torch.tensor(num_layers), next_position)

    def _embed_token(self, token: int) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([token]))

    def _features(self, image: Image.Image) -> torch.Tensor:
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        return features[0] if not isinstance(features, torch.Tensor) or features.ndim == 3 else features

    @torch.inference_mode()
    def decode(self, prompt: Prompt, steps: int) -> Reference:
        """Answer through transformers' own forward pass, everything anew each step; evicts nothing."""

        def last_hidden(answered: Sequence[int]) -> torch.Tensor:
            later = torch.arange(len(answered)) + prompt.next_position
            output = self.model.model.language_model(
                inputs_embeds=torch.cat([prompt.rows, *map(self._embed_token, answered)])[None],
                position_ids=torch.cat([prompt.positions, later])[None],
                # Without a mask, transformers takes gaps in the positions for borders of packed sequences.
                attention_mask=torch.ones(1, len(prompt.rows) + len(answered), dtype=torch.long),
                use_cache=False,
            )
            return output.last_hidden_state[0, -1]

        whole = torch.full_like(prompt.num_layers, self.geometry.num_layers)
        return self._answer(replace(prompt, num_layers=whole), last_hidden, steps)

    @torch.inference_mode()
    def decode_by_layer(self, prompt: Prompt, steps: int) -> Reference:
        """Answer layer by layer, each on the rows present there; keys and values are kept between steps."""
        language_model, cache = self.model.model.language_model, DynamicCache()

        def last_hidden(answered: Sequence[int]) -> torch.Tensor:
            rows, positions, num_layers = prompt.rows, prompt.positions, prompt.num_layers
            if answered:  # the prompt's keys and values are in the cache
                rows = self._embed_token(answered[-1])
                positions = torch.tensor([prompt.next_position + len(answered) - 1])
                num_layers = torch.tensor([self.geometry.num_layers])
            for index, layer in enumerate(language_model.layers):
                present = num_layers > index
                rows, positions, num_layers = rows[present], positions[present], num_layers[present]
                # Rows see the rows before them; a single new row sees every row this layer has had.
                mask = torch.full((len(rows), len(rows)), -torch.inf).triu(1)[None, None]
                rows = layer(
                    rows[None],
                    attention_mask=None if answered else mask,
                    position_embeddings=language_model.rotary_emb(rows, positions[None]),
                    past_key_values=cache,
                )[0]
            return language_model.norm(rows[-1])

        return self._answer(prompt, last_hidden, steps)

    def _answer(
        self, prompt: Prompt, last_hidden: Callable[[Sequence[int]], torch.Tensor], steps: int
    ) -> Reference:
        """Greedily; `last_hidden` gives the last row's final state, given the tokens answered so far."""
        token_ids: list[int] = []
        logprobs: list[torch.Tensor] = []
        for _ in range(steps):
            logits = self.model.lm_head(last_hidden(token_ids))
            logprobs.append(torch.log_softmax(logits.double(), dim=-1))
            token_ids.append(int(logits.argmax()))
        rows_per_layer = [int((prompt.num_layers > layer).sum()) for layer in range(self.geometry.num_layers)]
        return Reference(token_ids, torch.stack(logprobs), len(prompt.rows), rows_per_layer)
