# SPDX-License-Identifier: Apache-2.0
"""The exact reference: transformers in float32, fed the embeddings a plan asks for; a class per family.

Without eviction the stock forward pass answers. With it, transformers' own decoder layers run one by one,
each on the rows present there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    DynamicCache,
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.slow_plan import embeddings_of
from vllm_crop.config import CropConfig
from vllm_crop.families.internvl import InternVLGeometry
from vllm_crop.families.registry import geometry_from_configs
from vllm_crop.planning.budget import Method
from vllm_crop.planning.geometry import ImageTokens, Region, TokenGrid
from vllm_crop.planning.plan import Compression, TokenPlan, make_plan, whole_image_plan


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
        positions: position ids `[1, tokens]`, or `[3, tokens]` with M-RoPE.
        num_layers: the decoder layers each token takes part in, counted from the first, `[tokens]`.
        next_position: of the first generated token.
        added: what is added to each token's row after layer 0, 1, ..., `[layers, tokens, hidden]`; no layers
            but with deepstack.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    num_layers: torch.Tensor
    next_position: int
    added: torch.Tensor


def naive_compress(features: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    """One mean per planned embedding, written out: `[num_tokens, hidden]` -> `[num_embeddings, hidden]`."""
    return torch.stack([features[list(e.tokens)].mean(dim=0) for e in embeddings_of(plan)])


DEFAULT_RIM = CropConfig().rim


class HfReference:
    """A model of transformers, attention written out (eager), one prompt at a time."""

    model_class: ClassVar[Any]
    image: ClassVar[str]  # as it is written in a prompt
    frame: ClassVar[tuple[str, ...]] = ()  # tokens of text before and after those of an image, or empty

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = self.model_class.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.image_token_id = self.processor.image_token_id
        self.geometry = geometry_from_configs(
            self.model.config.to_dict(), self.processor.image_processor.to_dict()
        )

    # What differs between families.

    def features(self, image: Image.Image) -> torch.Tensor:
        """The visual tokens in the order of the prompt, `[num_tokens, hidden]`; with deepstack as many more
        columns for each layer, as they are added after it."""
        raise NotImplementedError

    def features_of(self, image: Image.Image, plan: TokenPlan) -> torch.Tensor:
        """The same for an image with a plan."""
        return self.features(image)

    def compressed(self, features: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
        """What a plan makes of them, `[num_embeddings, hidden]`."""
        return naive_compress(features, plan)

    def image_positions(self, grid: ImageTokens) -> tuple[torch.Tensor, int]:
        """Position ids of an unpruned image that begins at 0, `[1 or 3, num_tokens]`, and what follows it."""
        raise NotImplementedError

    def position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions of a prompt as the language model takes them, with a batch dimension."""
        raise NotImplementedError

    def deepstack(self, added: torch.Tensor) -> dict[str, Any]:
        """How the language model takes `[layers, tokens, hidden]`, if it takes any."""
        assert not len(added)
        return {}

    def plan(
        self,
        image: Image.Image,
        region: Region | None,
        pruning_rate: float,
        compression: Compression,
        method: Method = "plc",
        eviction_layers: tuple[int, ...] = (),
        rim: float = DEFAULT_RIM,
    ) -> TokenPlan | None:
        """What is to become of an image; None if the model sees nothing of the region."""
        view = self.geometry.view(*image.size)
        seen = region and view.project(region)
        return seen and make_plan(
            self.geometry.grid(*image.size),
            seen,
            pruning_rate,
            compression,
            method=method,
            num_layers=self.geometry.num_layers,
            eviction_layers=eviction_layers,
            around=view.project(region.widened(rim)) if region and rim else None,
        )

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        images: Sequence[Image.Image],
        plans: Sequence[TokenPlan | None],
        steps: int,
        original_positions: bool | None = None,
    ) -> Reference:
        """Answer greedily.

        Args:
            prompt_ids: with one image token per image.
            plans: per image, None for all its tokens.
            original_positions: number tokens as in the unpruned prompt; None does so with M-RoPE only.
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
        original_positions: bool | None = None,
    ) -> Prompt:
        """The prompt as the language model is fed it."""
        if original_positions is None:
            original_positions = self.geometry.uses_mrope
        rows: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        evicted_from: list[int | None] = []
        next_position = 0
        pending = iter(zip(images, plans, strict=True))
        for token in self.framed(prompt_ids):
            if token != self.image_token_id:
                rows.append(self._embed_token(token))
                positions.append(self._same_in_all_dimensions(torch.tensor([next_position])))
                evicted_from.append(None)
                next_position += 1
                continue
            image, plan = next(pending)
            plan = plan or whole_image_plan(self.geometry.grid(*image.size))
            rows.append(self.compressed(self.features_of(image, plan), plan))
            if original_positions:
                within, span = self.image_positions(plan.grid)
                within = within[:, [e.position for e in embeddings_of(plan)]]
            else:
                within, span = self._same_in_all_dimensions(torch.arange(len(rows[-1]))), len(rows[-1])
            positions.append(within + next_position)
            evicted_from.extend(e.evicted_from_layer for e in embeddings_of(plan))
            next_position += span
        evicted_from[-1] = None  # the first answer token comes from the last row, even if it is an image's
        depth = self.geometry.num_layers
        num_layers = [depth if layer is None else min(layer, depth) for layer in evicted_from]
        width = max(row.shape[1] for row in rows)
        hidden = self._embed_token(0).shape[1]
        wide = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
        embeddings, *added = wide.split(hidden, dim=1)
        return Prompt(
            rows=embeddings,
            positions=torch.cat(positions, dim=1),
            num_layers=torch.tensor(num_layers),
            next_position=next_position,
            added=torch.stack(added) if added else wide.new_empty(0, len(wide), hidden),
        )

    def framed(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt with what stands beside the tokens of images, which are still one token each."""
        if not self.frame:
            return list(prompt_ids)
        ids = self.processor.tokenizer.convert_tokens_to_ids
        before, after = ([ids(token)] if token else [] for token in self.frame)
        framed = [[*before, one, *after] if one == self.image_token_id else [one] for one in prompt_ids]
        return [token for some in framed for token in some]

    def _same_in_all_dimensions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.expand(len(self.image_positions(TokenGrid(1, 1))[0]), -1)

    def _embed_token(self, token: int) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([token]))

    @torch.inference_mode()
    def decode(self, prompt: Prompt, steps: int) -> Reference:
        """Answer through transformers' own forward pass, everything anew each step; evicts nothing."""

        def last_hidden(answered: Sequence[int]) -> torch.Tensor:
            later = self._same_in_all_dimensions(torch.arange(len(answered)) + prompt.next_position)
            output = self.model.model.language_model(
                inputs_embeds=torch.cat([prompt.rows, *map(self._embed_token, answered)])[None],
                position_ids=self.position_ids(torch.cat([prompt.positions, later], dim=1)),
                **self.deepstack(torch.nn.functional.pad(prompt.added, (0, 0, 0, len(answered)))),
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
        language_model, cache = self.model.model.language_model, self.new_cache()

        def last_hidden(answered: Sequence[int]) -> torch.Tensor:
            rows, positions, num_layers = prompt.rows, prompt.positions, prompt.num_layers
            added = prompt.added
            if answered:  # the prompt's keys and values are in the cache
                rows = self._embed_token(answered[-1])
                last = torch.tensor([prompt.next_position + len(answered) - 1])
                positions = self._same_in_all_dimensions(last)
                num_layers, added = torch.tensor([self.geometry.num_layers]), added[:0, :1]
            for index, layer in enumerate(language_model.layers):
                present = num_layers > index
                rows, positions, num_layers = rows[present], positions[:, present], num_layers[present]
                added = added[:, present]
                # Rows see the rows before them; a single new row sees every row this layer has had. A layer
                # with a state reads them in their order.
                mask = torch.full((len(rows), len(rows)), -torch.inf).triu(1)[None, None]
                rows = layer(
                    rows[None],
                    attention_mask=mask if not answered and hasattr(layer, "self_attn") else None,
                    position_embeddings=language_model.rotary_emb(rows, self.position_ids(positions)),
                    past_key_values=cache,
                )[0]
                if index < len(added):
                    rows = rows + added[index]
            return language_model.norm(rows[-1])

        return self._answer(prompt, last_hidden, steps)

    def new_cache(self) -> DynamicCache:
        """What layers keep of the rows they have had."""
        return DynamicCache()

    @torch.inference_mode()
    def attention(self, prompt: Prompt) -> torch.Tensor:
        """How much the last row looks at every row, mean over heads, `[layers, rows]`; zeros of layers that
        do not look."""
        layers = self.model.model.language_model.layers
        seen = torch.zeros(len(layers), len(prompt.rows), dtype=torch.float64)

        def note(layer: int) -> Callable[..., None]:
            def look(module: Any, args: Any, output: Any) -> None:
                seen[layer] = output[1][0, :, -1].double().mean(0)

            return look

        hooks = [
            layer.self_attn.register_forward_hook(note(index))
            for index, layer in enumerate(layers)
            if hasattr(layer, "self_attn")
        ]
        try:
            self.decode(prompt, steps=1)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

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


class HfLlava(HfReference):
    """LLaVA-1.5: every image has 24x24 tokens, numbered one after another."""

    model_class = LlavaForConditionalGeneration
    image = "<image>"

    def features(self, image: Image.Image) -> torch.Tensor:
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        return features[0] if not isinstance(features, torch.Tensor) or features.ndim == 3 else features

    def image_positions(self, grid: ImageTokens) -> tuple[torch.Tensor, int]:
        return torch.arange(grid.num_tokens)[None], grid.num_tokens

    def position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        return positions


class HfLlavaNext(HfLlava):
    """LLaVA-NeXT: the whole image and its tiles, numbered one after another, newlines included."""

    model_class = LlavaNextForConditionalGeneration

    def features(self, image: Image.Image) -> torch.Tensor:
        inputs = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        found = self.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        )
        return found.pooler_output[0]


class HfLlavaOnevision(HfLlavaNext):
    """LLaVA-OneVision: the same, with a limit on the tiles' tokens."""

    model_class = LlavaOnevisionForConditionalGeneration


class HfQwen2_5VL(HfReference):
    """Qwen2.5-VL: images have as many tokens as their size asks for, numbered by time, row and column."""

    model_class = Qwen2_5_VLForConditionalGeneration
    image = "<|vision_start|><|image_pad|><|vision_end|>"

    def features(self, image: Image.Image) -> torch.Tensor:
        return self.see(image).pooler_output[0]

    def see(self, image: Image.Image) -> Any:
        """What the vision tower makes of an image."""
        inputs = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        return self.model.get_image_features(
            pixel_values=inputs["pixel_values"].to(self.model.dtype), image_grid_thw=inputs["image_grid_thw"]
        )

    def image_positions(self, grid: ImageTokens) -> tuple[torch.Tensor, int]:
        assert isinstance(grid, TokenGrid)
        coordinates = [(0, row, col) for row in range(grid.rows) for col in range(grid.cols)]
        return torch.tensor(coordinates).T, max(grid.rows, grid.cols)

    def position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        return positions[:, None]


class HfQwen2VL(HfQwen2_5VL):
    """Qwen2-VL: the same with an older vision tower."""

    model_class = Qwen2VLForConditionalGeneration


class HfQwen3VL(HfQwen2_5VL):
    """Qwen3-VL: numbered likewise, and features of deeper and deeper vision layers are added after the first
    decoder layers."""

    model_class = Qwen3VLForConditionalGeneration

    def features(self, image: Image.Image) -> torch.Tensor:
        seen = self.see(image)
        # Per layer a list with a tensor per image, or (transformers before 5.19) one tensor for all images.
        levels = [level if isinstance(level, torch.Tensor) else level[0] for level in seen.deepstack_features]
        return torch.cat([seen.pooler_output[0], *levels], dim=1)

    def deepstack(self, added: torch.Tensor) -> dict[str, Any]:
        everywhere = torch.ones(1, added.shape[1], dtype=torch.bool)  # nothing is added to text: zeros
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": list(added)}


class HfQwen3VLMoe(HfQwen3VL):
    """The same with a mixture of experts."""

    model_class = Qwen3VLMoeForConditionalGeneration


class HfQwen3_5(HfQwen2_5VL):
    """Qwen3.5: most layers remember the rows in a state; nothing is added after the first."""

    model_class = Qwen3_5ForConditionalGeneration

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())


class HfQwen3_5Moe(HfQwen3_5):
    """The same with a mixture of experts."""

    model_class = Qwen3_5MoeForConditionalGeneration


class HfInternVL(HfLlava):
    """InternVL: tiles one after another, the whole image last, framed by two tokens of text."""

    model_class = InternVLForConditionalGeneration
    image = "<IMG_CONTEXT>"
    frame = ("<img>", "</img>")

    def features(self, image: Image.Image) -> torch.Tensor:
        found = self.model.get_image_features(pixel_values=self.tiles(image))
        return found.pooler_output.flatten(0, 1)

    def tiles(self, image: Image.Image) -> torch.Tensor:
        """`[tiles, 3, side, side]`."""
        process = self.processor.image_processor
        tiles: torch.Tensor = process(image.convert("RGB"), crop_to_patches=True, return_tensors="pt")[
            "pixel_values"
        ]
        return tiles


class HfInternVLChat(HfInternVL):
    """The same model as OpenGVLab publishes it, its pixels as vLLM makes them."""

    image = "<image>"

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(checkpoint / "hf", dtype)

    def tiles(self, image: Image.Image) -> torch.Tensor:
        from vllm.transformers_utils.processors.internvl import image_to_pixel_values_internvl

        known = self.geometry
        assert isinstance(known, InternVLGeometry)
        return image_to_pixel_values_internvl(
            image,
            input_size=known.tile_pixels,
            min_num=known.min_tiles,
            max_num=known.max_tiles,
            use_thumbnail=known.thumbnail,
        )

    def framed(self, prompt_ids: Sequence[int]) -> list[int]:
        letters = self.processor.tokenizer.encode(self.image, add_special_tokens=False)
        found = list(prompt_ids)
        for place in reversed(range(len(found))):
            if found[place : place + len(letters)] == letters:
                found[place : place + len(letters)] = [self.image_token_id]
        return super().framed(found)


class HfMistral3(HfLlava):
    """Mistral 3: native sizes, a break after each row but the last, and what ends the image."""

    model_class = Mistral3ForConditionalGeneration
    image = "[IMG]"
    frame = ("", "[IMG_END]")

    def features(self, image: Image.Image) -> torch.Tensor:
        side = self.processor.patch_size * self.processor.spatial_merge_size
        inputs = self.processor.image_processor(
            image.convert("RGB"), patch_size={"height": side, "width": side}, return_tensors="pt"
        )
        ((height, width),) = inputs["image_sizes"].tolist()
        # Twice, as transformers takes the only token of an image for the batch.
        found = self.model.get_image_features(
            pixel_values=inputs["pixel_values"][:, :, :height, :width].repeat(2, 1, 1, 1),
            image_sizes=inputs["image_sizes"].repeat(2, 1),
        ).pooler_output[0]
        line_break = self._embed_token(self.processor.image_break_token_id)
        rows = [torch.cat([row, line_break]) for row in found.split(width // side)]
        return torch.cat(rows)[:-1]


class HfGlm4v(HfQwen2_5VL):
    """GLM-4V: numbered likewise."""

    model_class = Glm4vForConditionalGeneration
    image = "<|begin_of_image|><|image|><|end_of_image|>"


class HfGlm4vMoe(HfGlm4v):
    """The same with a mixture of experts."""

    model_class = Glm4vMoeForConditionalGeneration
